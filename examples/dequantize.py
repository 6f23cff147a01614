"""Write one set of a checkpoint as an ordinary model in its dtype, with the rounded weights.

    python examples/dequantize.py CHECKPOINT OUT [--set NAME]

CHECKPOINT is one of ours, or one that llmcompressor made. Any program that reads the unquantized
model reads OUT, so that what 4-bit weights lose can be measured where no kernel takes them: vLLM
has none on GPUs for the 576 inputs of SmolLM2, for example. Inputs are not quantized then, so this
shows W4A16, and of W8A8 the weights alone.
"""

import argparse
from pathlib import Path

from safetensors.torch import save_file

from vllm_qoq.checkpoint.float_view import FloatView
from vllm_qoq.checkpoint.folder import Checkpoint, side_files
from vllm_qoq.checkpoint.format import SECTION, KVSection, Section
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.checkpoint.verify import open_merged
from vllm_qoq.checkpoint.writer import copy_file, write_json
from vllm_qoq.errors import UserError
from vllm_qoq.models.config import CONFIG

# Files of a checkpoint that are not true of the model.
REPORTS = ("quantization_report", "qoq_tune", "recipe")


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


def main() -> None:
    """Read the command line, dequantize, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--set", help="of a checkpoint with several sets")
    args = parser.parse_args()
    try:
        if args.out.exists():
            raise UserError(f"{args.out}: is there already; name a new folder")
        model = FloatView(stored_set(args.checkpoint, args.set))
        model.check_links()
        files = [f for f in side_files(args.checkpoint) if not f.name.startswith(REPORTS)]
        tensors = {name: model.get(name).contiguous() for name in model.tensors}
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    args.out.mkdir(parents=True)
    save_file(tensors, args.out / "model.safetensors", metadata={"format": "pt"})
    write_json(args.out / CONFIG, model.config)
    for file in files:
        (args.out / file).parent.mkdir(parents=True, exist_ok=True)
        copy_file(args.checkpoint / file, args.out / file)
    print(f"saved {args.checkpoint} as {args.out}")


if __name__ == "__main__":
    main()
