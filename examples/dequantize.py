"""Write one set of a checkpoint as an ordinary model in its dtype, with the rounded weights.

    python examples/dequantize.py CHECKPOINT OUT [--set NAME]

CHECKPOINT is one of ours, or one that llmcompressor made. Any program that reads the unquantized
model reads OUT, so that what 4-bit weights lose can be measured where no kernel takes them: vLLM
has none on GPUs for the 576 inputs of SmolLM2, for example. Inputs are not quantized then, so this
shows W4A16, and of W8A8 the weights alone.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_qoq.checkpoint.dequantize import dequantize
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.checkpoint.format import K_MEAN, SECTION, KVSection, Section
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.checkpoint.verify import open_merged
from vllm_qoq.checkpoint.writer import copy_file, write_json
from vllm_qoq.errors import UserError
from vllm_qoq.models.config import CONFIG

# What a checkpoint has that is not true of the model, or is written anew.
MADE = (CONFIG, "model.", "quantization_report", "qoq_tune", "recipe", "README", ".")


def stored_set(folder: Path, name: str | None) -> StoredSet:
    """Find the set with this name, or the only one."""
    checkpoint = Checkpoint.open(folder)
    if not isinstance(checkpoint.section, Section):
        method = checkpoint.config.get(SECTION)
        if method is None or isinstance(checkpoint.section, KVSection):
            raise UserError(f"{folder}: has no quantized weights")
        if name is not None:
            raise UserError(f"--set {name}: {folder} has no sets; leave out --set")
        return StoredSet("", checkpoint, method, checkpoint.tensors)
    sets = {found.name: found for found in open_merged(folder)[2]}
    if name not in sets and (name is not None or len(sets) > 1):
        given = "" if name is None else f"--set {name}: "
        raise UserError(f"{given}{folder} has the sets {', '.join(sets)}; name one with --set")
    return sets[name] if name is not None else next(iter(sets.values()))


def weights(found: StoredSet, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Dequantize every layer; all else stays as it is, but for the mean of K."""
    tensors = {}
    for layer, leaves in found.layers.items():
        if layer not in found.quantized:
            kept = (f"{layer}.{leaf}" for leaf in leaves if leaf != K_MEAN)
            tensors |= {name: found.get(name) for name in kept}
            continue
        if "input_ratio" in leaves:
            raise UserError(f"{layer}: its inputs have ratios to those of other sets")
        rows = (0, found.size(layer)[0])
        tensors[f"{layer}.weight"] = dequantize(found, layer, rows).to(dtype)
        if "bias" in leaves:
            tensors[f"{layer}.bias"] = found.get(f"{layer}.bias")
    return tensors


def main() -> None:
    """Read the command line, dequantize, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--set", help="of a checkpoint with several sets")
    args = parser.parse_args()
    try:
        found = stored_set(args.checkpoint, args.set)
        config = {key: value for key, value in found.checkpoint.config.items() if key != SECTION}
        tensors = weights(found, getattr(torch, config.get("dtype", "bfloat16")))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    args.out.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, args.out / "model.safetensors")
    write_json(args.out / CONFIG, config)
    for file in args.checkpoint.iterdir():
        is_made = file.suffix == ".safetensors" or file.name.startswith(MADE)
        if file.is_file() and not is_made:
            copy_file(file, args.out / file.name)
    print(f"saved {args.checkpoint} as {args.out}")


if __name__ == "__main__":
    main()
