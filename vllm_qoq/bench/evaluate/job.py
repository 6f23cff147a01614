"""A run of `vllm-qoq evaluate`: an engine a precision of the KV cache, all sets in each.

Every engine is a process of its own, which ends before the next one starts, and has the float model
beside it. The float model is also served by vLLM: its rows say what vLLM's own rounding costs, and
the KV cache alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_qoq.bench import BenchError
from vllm_qoq.bench.evaluate import windows as pieces
from vllm_qoq.bench.evaluate.log import pool_settings
from vllm_qoq.bench.evaluate.scores import (
    Score,
    WindowScore,
    combine,
    same_tokens,
    score_window,
)
from vllm_qoq.bench.evaluate.windows import Windows
from vllm_qoq.bench.foreign import refuse_cache
from vllm_qoq.checkpoint import hub
from vllm_qoq.checkpoint.folder import Checkpoint, error_context
from vllm_qoq.checkpoint.format import SECTION, Section, split_name
from vllm_qoq.checkpoint.kv_config import UNQUANTIZED, Bits, described, short_name
from vllm_qoq.errors import shown
from vllm_qoq.models.config import CONFIG, text_config
from vllm_qoq.models.vision import vision_language
from vllm_qoq.progress import Clock
from vllm_qoq.text_file import check_text

# What a checkpoint has of the model that was quantized.
_SAME = (
    *("vocab_size", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)
FLOAT = "float model"
"""The name of the rows of the float model in vLLM."""


@dataclass(frozen=True)
class Row:
    """One set with one precision of the KV cache; `weight_bytes` are all that the set needs."""

    set_name: str
    kv_bits: Bits
    weight_bytes: int
    score: Score


@dataclass(frozen=True)
class Evaluation:
    """The result of a run.

    seqlen, windows, scored_tokens  tokens of a window, their number, and scored tokens in all
    chunk                           tokens a step of the engines whose KV cache is quantized
    generated                       tokens that each made of the first half of every window
    """

    checkpoint: str
    against: str
    text: str
    seqlen: int
    windows: int
    scored_tokens: int
    chunk: int
    generated: int
    rows: tuple[Row, ...]

    def document(self) -> dict[str, Any]:
        """Make the JSON document."""
        return asdict(self)


@dataclass(frozen=True)
class Task:
    """What one process does: an engine of a folder, and its sets or some of them."""

    folder: Path
    sets: tuple[str, ...]
    against: Path
    windows: Windows
    kv_bits: Bits
    chunk: int
    generate: int
    label: str
    quiet: bool


def evaluate(
    checkpoint: str | Path,
    against: str | Path,
    text: str | Path,
    *,
    seqlen: int = 512,
    windows: int | None = None,
    kv_bits: Sequence[Bits] = (16, 8, 4),
    chunk: int = 16,
    generate: int | None = None,
    quiet: bool = True,
) -> Evaluation:
    """Compare the next token of every set of a checkpoint with that of the float model.

    checkpoint  folder of a checkpoint of ours, or of any other that vLLM serves, or its id on the
                Hugging Face Hub, which is downloaded first
    against     folder of the model that was quantized, or its id
    text        file to score, in UTF-8
    seqlen      tokens of a window, of which the second half is scored
    windows     at most so many, taken from all over the text; None for all
    kv_bits     precisions of the KV cache, of 16, 8, "k8v4" and 4
    chunk       tokens a step where the cache is quantized, so that all others are read from it
    generate    greedy tokens that each makes of the first half of every window, up to half a
                window; 0 for none; 32 by default, or half a window that is shorter
    quiet       print no progress

    Raises UserError for what does not fit together, and where vLLM does not start.
    """
    folder, model = local_folders(checkpoint, against, Path(text), quiet=quiet)
    generate = min(32, seqlen // 2) if generate is None else generate
    check(folder, model, Path(text), seqlen, kv_bits, generate)
    cut = cut_windows(folder, model, Path(text), seqlen, windows)
    sizes = {FLOAT: Checkpoint.open(model).total_bytes}
    sets, own = sets_of(folder)
    sizes |= own
    rows = []
    for bits in kv_bits:
        for label, place, names in ((FLOAT, model, ()), ("sets", folder, sets)):
            shown = f"{label}, {short_name(bits).upper()}"
            task = Task(place, names, model, cut, bits, chunk, generate, shown, quiet)
            for name, scores in run_task(task).items():
                row = FLOAT if label == FLOAT else name or next(iter(own))
                rows.append(Row(row, bits, sizes[row], combine(scores)))
    return Evaluation(
        checkpoint=hub.name_of(folder),
        against=hub.name_of(model),
        text=Path(text).name,
        seqlen=seqlen,
        windows=len(cut.tokens),
        scored_tokens=len(cut.tokens) * cut.scored,
        chunk=chunk,
        generated=generate,
        rows=tuple(rows),
    )


def local_folders(
    checkpoint: str | Path, against: str | Path, text: Path, *, quiet: bool
) -> tuple[Path, Path]:
    """Find the folders of the two models, either of which may be an id of the Hub."""
    check_text("--text", text)  # before a download
    return hub.local_folder(checkpoint, quiet=quiet), hub.local_folder(against, quiet=quiet)


def check(
    folder: Path, model: Path, text: Path, seqlen: int, kv_bits: Sequence[Bits], generate: int = 0
) -> None:
    """Raise UserError for what can be refused before a model is loaded."""
    check_text("--text", text)
    if generate > seqlen // 2:
        raise BenchError(
            f"--generate {generate}: at most {seqlen // 2}, which is half of --seqlen {seqlen}"
        )
    size = text.stat().st_size
    if size < 2 * seqlen - 1:  # no token is shorter than a byte; some have a space before it
        raise BenchError(
            f"--text {text}: {size} bytes, fewer than two windows of {seqlen} tokens; give a "
            "longer text or a smaller --seqlen"
        )
    if model.suffix.lower() == ".gguf":
        raise BenchError(
            f"--against {model}: is GGUF; give the folder that quantize made of it, OUT.float"
        )
    configs = []
    for place in (folder, model):
        with error_context(place):
            configs.append(Checkpoint.open(place).config)
    for place, config in zip((folder, model), configs, strict=True):
        if vision_language(config) is not None:
            raise BenchError(
                f"{place}: {CONFIG}: architectures: {shown(config.get('architectures'))}: evaluate "
                "compares models of text alone; measure this one with `vllm-qoq perplexity`"
            )
    if (most := _context(configs[1])) is not None and seqlen >= most:
        raise BenchError(
            f"--seqlen {seqlen}: {model} has a context of {most} tokens, and a window takes one "
            f"more than it has; give at most {most - 1}"
        )
    if quantized := [described(bits) for bits in kv_bits if bits != UNQUANTIZED]:
        refuse_cache(folder, configs[0], ", ".join(quantized), "give --kv-bits 16")
    if configs[1].get(SECTION) is not None:
        raise BenchError(
            f"--against {model}: {CONFIG} has a {SECTION}; give the model in bf16 or fp16 that was "
            "quantized"
        )
    for key in _SAME:
        ours, theirs = (config.get(key) for config in configs)
        if ours != theirs:
            raise BenchError(
                f"--against {model}: {CONFIG}: {key} is {theirs}, but {ours} in {folder}; give the "
                "model that was quantized"
            )


def _context(config: Mapping[str, Any]) -> int | None:
    """Read how many tokens a model takes; None where that is not said, or RoPE is scaled."""
    text = text_config(config)
    most, scaling = text.get("max_position_embeddings"), ("rope_scaling", "rope_parameters")
    parts = [part for key in scaling if isinstance(part := text.get(key), Mapping)]
    is_scaled = any("factor" in part for part in parts)
    return most if type(most) is int and not is_scaled else None


def cut_windows(folder: Path, model: Path, text: Path, length: int, most: int | None) -> Windows:
    """Cut the text, which both tokenizers have to see alike."""
    from vllm_qoq.bench.evaluate.float_model import load_tokenizer

    content = text.read_text(encoding="utf-8")
    tokenizers = [load_tokenizer(place) for place in (folder, model)]
    ids = [tokenizer(content, add_special_tokens=False).input_ids for tokenizer in tokenizers]
    if ids[0] != ids[1]:
        raise BenchError(
            f"--against {model}: its tokenizer makes other tokens of the text than that of "
            f"{folder}; give the model that was quantized"
        )
    return pieces.cut(ids[0], pieces.begins_with(tokenizers[1]), length, most)


def sets_of(folder: Path) -> tuple[tuple[str, ...], dict[str, int]]:
    """Name the sets of a checkpoint, and count the bytes of the weights that each needs.

    A checkpoint that is not ours has no sets, and one entry of the second by its method; so has a
    model of which only the KV cache is quantized, by the folder's name.
    """
    checkpoint = Checkpoint.open(folder)
    section = checkpoint.section
    if not isinstance(section, Section):
        method = (checkpoint.config.get(SECTION) or {}) if section is None else {}
        return (), {str(method.get("quant_method", hub.name_of(folder))): checkpoint.total_bytes}
    sizes: dict[str | None, int] = dict.fromkeys((None, *section.sets), 0)
    for name, info in checkpoint.tensors.items():
        sizes[split_name(name, section.sets)[0]] += info.nbytes
    return tuple(section.sets), {name: _bytes_of(section, sizes, name) for name in section.sets}


def _bytes_of(section: Section, sizes: dict[str | None, int], name: str) -> int:
    base = section.base_of(name)
    return sizes[None] + sizes[name] + (sizes[base] if base is not None else 0)


def run_task(task: Task) -> dict[str | None, list[WindowScore]]:
    """Run a task in a process of its own, which gives all memory back.

    What vLLM logs there is shown, if the task is quiet only where it fails.
    """
    with pool_settings(task.quiet) as settings, ProcessPoolExecutor(1, **settings) as pool:
        try:
            return pool.submit(_measure, task).result()
        except BrokenProcessPool as error:
            raise BenchError(
                f"{task.folder}: the process with its engine and the float model died, as it does "
                "for want of memory; its log above may say more. Use a smaller --seqlen, or a "
                "machine with more memory"
            ) from error


def _measure(task: Task) -> dict[str | None, list[WindowScore]]:
    """Score every window in every set; the set is None for a checkpoint without."""
    from vllm_qoq.bench.evaluate.engine import Engine
    from vllm_qoq.bench.evaluate.float_model import FloatModel

    cut = task.windows
    engine = Engine(
        task.folder, task.sets, length=cut.length, kv_bits=task.kv_bits, chunk=task.chunk
    )
    reference = FloatModel(task.against)
    names: tuple[str | None, ...] = task.sets or (None,)
    scores: dict[str | None, list[WindowScore]] = {name: [] for name in names}
    done = Clock(task.label, len(cut.tokens), task.quiet)
    for index, window in enumerate(cut.tokens):
        expected = reference.logits(window, cut.first)
        for name in names:
            logits = engine.logits(window, cut.first, name)
            scores[name].append(score_window(expected, logits, cut.targets(index)))
        if task.generate:
            context = cut.context(index)
            expected_text = reference.continuation(context, task.generate)
            for name in names:
                found = engine.continuation(context, task.generate, name)
                same = same_tokens(expected_text, found)
                scores[name][-1] = replace(scores[name][-1], greedy_tokens=same)
        done()
    return scores
