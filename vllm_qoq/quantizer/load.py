"""Loading of the model and its tokenizer, from the files that were checked and no others.

Nothing of the folder is run, and transformers does not choose the files: it gets the
tensors that `Checkpoint` describes, and a config without the keys that name code or files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from vllm_qoq.checkpoint import towers
from vllm_qoq.checkpoint.folder import CODE_KEYS, Checkpoint
from vllm_qoq.checkpoint.format import SECTION
from vllm_qoq.checkpoint.language import LanguagePart, beside_language, stored_name
from vllm_qoq.errors import reason
from vllm_qoq.models.config import CONFIG, architecture_name
from vllm_qoq.models.linears import CONSTANT
from vllm_qoq.models.tensors import EMBEDDING, HEAD
from vllm_qoq.progress import Progress
from vllm_qoq.quantizer import QuantizeError
from vllm_qoq.quantizer.experts import use_linear_experts
from vllm_qoq.quantizer.inputs import DTYPES, dtype_name, is_tied
from vllm_qoq.quantizer.model import Module, architecture, layer_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_CHUNK_VALUES = 4 << 20
# Keys of a `config.json` that name code or files, or that a float model does without; from a number
# of labels a list of them would be made.
_UNUSED_KEYS = CODE_KEYS | {
    *(SECTION, "_name_or_path", "fusion_config", "distributed_config"),
    *("attn_implementation", "_attn_implementation", "experts_implementation"),
    *("num_labels", "id2label", "label2id"),
}


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; QuantizeError if it is broken or another model's."""
    from transformers import AutoTokenizer

    folder, config = checkpoint.path, _config(checkpoint)
    rows, _ = checkpoint.tensors[EMBEDDING].shape
    remedy = "copy the model's tokenizer.json and tokenizer_config.json there again"
    code = "its own code (auto_map) is not run, only classes of transformers"
    with _refusing(f"{folder}: the tokenizer cannot be loaded ({code})", remedy):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=False, local_files_only=True
        )
        vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
        last = max(vocabulary.values(), default=-1)
        # A class adds tokens of its own, and finetunes a padding token, which no text has.
        last_of_text = max((i for token, i in vocabulary.items() if token not in added), default=-1)
    if last_of_text >= rows:
        raise QuantizeError(
            f"{folder}: the tokenizer has tokens up to {last_of_text}, but the embedding only "
            f"{rows} rows; {remedy}"
        )
    if last + 1 <= rows // 2:
        raise QuantizeError(
            f"{folder}: the tokenizer has {last + 1} tokens, but the embedding {rows} rows, so it "
            f"is not this model's; {remedy}"
        )
    return tokenizer


def check_model(checkpoint: Checkpoint) -> None:
    """Build the model without memory; QuantizeError unless its tensors are the checkpoint's."""
    config = _config(checkpoint)
    with _building(checkpoint), torch.device("meta"):
        model = _class(config)(config)
        use_linear_experts(model, layer_names(checkpoint.config))
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop(HEAD)
    found = {name: checkpoint.tensors[name].shape for name in _names(checkpoint)}
    found.pop(HEAD if config.tie_word_embeddings else "", None)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            place = stored_name(name, checkpoint.tensors)
            raise QuantizeError(
                f"{checkpoint.path}: {place}: is {_shape(found.get(name))} there and "
                f"{_shape(wanted.get(name))} in the model that {CONFIG} describes; download both "
                "again, from one model"
            )


def check_towers(checkpoint: Checkpoint) -> None:
    """Raise QuantizeError unless what is beside a language model is as `config.json` says."""
    if not isinstance(checkpoint, LanguagePart):
        return
    if not towers.can_be_checked(checkpoint.whole):
        name = architecture_name(checkpoint.whole.config)
        raise QuantizeError(f"{checkpoint.path}: transformers has no {name}; install a newer one")
    for finding in towers.findings(checkpoint.whole):
        raise QuantizeError(f"{checkpoint.path}: {finding}; download both again, from one model")


def check_values(checkpoint: Checkpoint, progress: Progress) -> None:
    """Read every tensor once; QuantizeError for NaN, infinity, or two heads where one is tied."""
    tensors = {name: checkpoint.tensors[name] for name in _names(checkpoint)}
    tensors |= beside_language(checkpoint)
    dtype = _dtype(checkpoint)
    with progress.stage("check values", sum(info.nbytes for info in tensors.values())) as advance:
        for name, info in tensors.items():
            for values in checkpoint.get(name).reshape(-1).split(_CHUNK_VALUES):
                if not values.isfinite().all():
                    raise QuantizeError(
                        f"{info.file}: {info.name}: holds NaN or infinity; download the model again"
                    )
                if not values.to(dtype).isfinite().all():
                    raise QuantizeError(
                        f"{info.file}: {info.name}: holds {float(values.abs().max()):g}, beyond "
                        f"the {str(dtype).removeprefix('torch.')} in which {CONFIG} runs the "
                        "model; write bfloat16 there"
                    )
            advance(info.nbytes)
    if not is_tied(checkpoint.config) or HEAD not in checkpoint.tensors:
        return
    if not torch.equal(checkpoint.get(HEAD), checkpoint.get(EMBEDDING)):
        head, embedding = checkpoint.tensors[HEAD], checkpoint.tensors[EMBEDDING]
        raise QuantizeError(
            f"{head.file}: {head.name}: differs from {embedding.name}, although "
            f"{CONFIG} ties them; write tie_word_embeddings: false there, or leave it out of "
            "the file if the embedding serves as lm_head"
        )


def load_model(checkpoint: Checkpoint) -> Module:
    """Load the model into the CPU's memory, mapped from its files, in its config.json's dtype."""
    folder = checkpoint.path
    config, dtype = _config(checkpoint), _dtype(checkpoint)
    with _building(checkpoint):
        model, info = _class(config).from_pretrained(
            None,
            config=config,
            # Each file is mapped once, for all its tensors; writing to one copies the page.
            state_dict={name: checkpoint.get(name) for name in _names(checkpoint)},
            dtype=dtype,
            # The fused attention of transformers leaves out a bound of the scores.
            attn_implementation="eager" if _has_capped_scores(config) else "sdpa",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    for what, names in info.items():
        if names:
            raise QuantizeError(
                f"{folder}: {what.replace('_', ' ')}: {sorted(map(str, names))[0]}; download the "
                "model again"
            )
    use_linear_experts(model, layer_names(checkpoint.config))
    return model.eval()


def _config(checkpoint: Checkpoint) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING

    values = {k: v for k, v in checkpoint.config.items() if k not in _UNUSED_KEYS}
    names = architecture(checkpoint.config).names
    if names is not None and names.has_wrong_hidden_act:
        values["hidden_act"] = names.activation
    with _refusing(f"{checkpoint.path / CONFIG}", "mend it, or download the model again"):
        return CONFIG_MAPPING[values.pop("model_type")].from_dict(values)


def _has_capped_scores(config: PreTrainedConfig) -> bool:
    return getattr(config, "attn_logit_softcapping", None) is not None


def _class(config: PreTrainedConfig) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _names(checkpoint: Checkpoint) -> list[str]:
    """List the tensors that the model reads, file by file."""
    names = (name for name in checkpoint.tensors if not name.endswith(CONSTANT))
    return sorted(names, key=lambda name: (checkpoint.tensors[name].file, name))


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    name = dtype_name(checkpoint.config)
    if name is None:
        stored = checkpoint.tensors[EMBEDDING].dtype
        name = next(name for name, short in DTYPES.items() if short == stored)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _building(checkpoint: Checkpoint) -> AbstractContextManager[None]:
    what = f"{checkpoint.path}: transformers cannot build the model"
    return _refusing(what, f"mend {CONFIG}, or download the model again")


@contextmanager
def _refusing(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever a library raises at a stranger's file into a QuantizeError of one line."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, QuantizeError):
        raise
    except BaseException as error:  # the panics of tokenizers, in Rust, are no Exceptions
        raise QuantizeError(f"{what}: {reason(error)}; {remedy}") from error
