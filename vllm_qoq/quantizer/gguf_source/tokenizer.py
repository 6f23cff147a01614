"""The tokenizer of a GGUF file, mended where transformers makes another one of it.

transformers splits the text of every BPE tokenizer of architecture llama as GPT-2 does, and gives
the end of a text the token that begins one. `tokenizer.ggml.pre` names how text is split, and the
file has the numbers of the special tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vllm_qoq.errors import shown
from vllm_qoq.quantizer import QuantizeError
from vllm_qoq.quantizer.gguf_source.header import Array, Header
from vllm_qoq.quantizer.gguf_source.sizes import EMBEDDING

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

_MODEL, _PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
_PREFIX, _ADD_BOS = "tokenizer.ggml.", "tokenizer.ggml.add_bos_token"
# Kind, BPE of bytes or SentencePiece -> the arrays that it needs, and whether they hold texts.
_ARRAYS = {
    "gpt2": {"tokens": True, "merges": True},
    "llama": {"tokens": True, "scores": False, "token_type": False},
}
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
# Llama 3 and Qwen differ in the number of digits that stay together.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def check_tokenizer(header: Header) -> None:
    """Raise QuantizeError for a kind of tokenizer, or a way to split text, that is not known."""
    pre, kind = header.keys.get(_PRE), header.keys.get(_MODEL)
    if kind not in _ARRAYS:
        raise QuantizeError(
            f"{header.path}: {_MODEL}: {shown(kind)} is not known; known are {', '.join(_ARRAYS)}. "
            "Put the original model's tokenizer.json and tokenizer_config.json beside the file, "
            "and they are taken"
        )
    if header.keys.get(_MODEL) == "gpt2" and pre not in _PRE_TOKENIZERS:
        raise QuantizeError(
            f"{header.path}: {_PRE}: {shown(pre)} is not known, so text would be split otherwise "
            f"than the model has learnt; known are {', '.join(_PRE_TOKENIZERS)}. Put the original "
            "model's tokenizer.json and tokenizer_config.json beside the file, and they are taken"
        )

    _check_vocabulary(header)


def _check_vocabulary(header: Header) -> None:
    """Raise QuantizeError where the tokenizer lacks a part, or is of another model."""

    def refuse(key: str, what: str) -> NoReturn:
        raise QuantizeError(
            f"{header.path}: {_PREFIX}{key}: {what}; download the file again, or put the original "
            "model's tokenizer.json and tokenizer_config.json beside it, and they are taken"
        )

    kind, counts = str(header.keys.get(_MODEL)), {}
    for key, is_text in _ARRAYS[kind].items():
        found = header.keys.get(_PREFIX + key)
        if found is None:
            refuse(key, "missing")
        if not isinstance(found, Array) or found.has_texts != is_text or not found.length:
            refuse(key, f"is no array of {'texts' if is_text else 'numbers'}")
        counts[key] = found.length
    tokens, rows = counts["tokens"], header.tensors[EMBEDDING].shape[0]
    if tokens > rows:
        refuse("tokens", f"{tokens}, but {EMBEDDING} has {rows} rows")
    for key in ("scores", "token_type"):
        if counts.get(key, tokens) != tokens:
            refuse(key, f"{counts[key]}, but there are {tokens} tokens")
    for name in _SPECIAL.values():
        key = f"{name}_token_id"
        number = header.keys.get(_PREFIX + key)
        if number is None:
            continue
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < tokens:
            refuse(key, f"{shown(number)} is none of {tokens} tokens")
    needs_bos = kind == "gpt2" and header.keys.get(_ADD_BOS)
    if needs_bos and header.keys.get(f"{_PREFIX}bos_token_id") is None:
        refuse("bos_token_id", "missing, but texts begin with it (add_bos_token)")


def load_tokenizer(header: Header, file: Path) -> PreTrainedTokenizerBase:
    """Make the tokenizer that `header` describes, from its `file`."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, trust_remote_code=False, local_files_only=True
    )
    pre = _PRE_TOKENIZERS.get(str(header.keys.get(_PRE)))
    if header.keys.get(_MODEL) == "gpt2" and pre is not None:
        from tokenizers.decoders import ByteLevel

        tokenizer.backend_tokenizer.pre_tokenizer = pre()
        # That of transformers leaves out a space where a text begins with one.
        tokenizer.backend_tokenizer.decoder = ByteLevel()
    for name, key in _SPECIAL.items():
        number = header.keys.get(f"{_PREFIX}{key}_token_id")
        token = None if number is None else tokenizer.convert_ids_to_tokens(int(number))
        setattr(tokenizer, name, token)
    if header.keys.get(_MODEL) == "gpt2" and header.keys.get(_ADD_BOS):
        _begin_with(tokenizer)
    return tokenizer


def _begin_with(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let every text begin with the token for that."""
    from tokenizers.processors import TemplateProcessing

    bos, number = tokenizer.bos_token, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, number)]
    )


def _gpt2() -> PreTokenizer:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> PreTokenizer:
    from tokenizers.pre_tokenizers import Digits, Sequence

    return Sequence([Digits(individual_digits=True), _gpt2()])


def _split(digits: str) -> Callable[[], PreTokenizer]:
    def make() -> PreTokenizer:
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

        bytes_alone = ByteLevel(add_prefix_space=False, use_regex=False)
        return Sequence([Split(Regex(_SPLIT % digits), "isolated"), bytes_alone])

    return make


_PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {
    "gpt-2": _gpt2,
    "smollm": _single_digits,
    "llama-bpe": _split("{1,3}"),
    "qwen2": _split(""),
}
"""The way to split text by its name in llama.cpp."""
