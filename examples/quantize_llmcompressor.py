"""Quantize a Hugging Face model to one set, W8A8 or W4A16, with llmcompressor.

    python examples/quantize_llmcompressor.py MODEL OUT --scheme w8a8 --text FILE

Run it once per scheme and join the results with `vllm-qoq merge`. W8A8 smooths
activation outliers into the weights (SmoothQuant), W4A16 quantizes weights in
groups; both round with GPTQ, and leave the embeddings and lm_head alone.
`w4a16-awq` scales the inputs by AWQ and rounds to the nearest.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerBase

SCHEMES = ("w8a8", "w4a16", "w4a16-awq")


def recipe(scheme: str, group_size: int) -> list[Modifier]:
    """List the modifiers that llmcompressor applies in turn."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    preset = preset_name_to_scheme(scheme.removesuffix("-awq").upper(), ["Linear"])
    if scheme != "w8a8":
        preset.weights.group_size = group_size
    what = {"config_groups": {"group_0": preset}, "ignore": ["lm_head"]}
    if scheme == "w4a16-awq":
        return [AWQModifier(), QuantizationModifier(**what)]
    gptq = GPTQModifier(**what)
    return [SmoothQuantModifier(smoothing_strength=0.8), gptq] if scheme == "w8a8" else [gptq]


def calibration_set(
    text: Path, tokenizer: PreTrainedTokenizerBase, samples: int, seqlen: int
) -> DataLoader:
    """Cut a file into pieces of `seqlen` tokens; `samples` of them are taken, from all over it."""
    import torch
    from torch.utils.data import DataLoader

    tokens = tokenizer(text.read_text(encoding="utf-8")).input_ids
    pieces = [tokens[i : i + seqlen] for i in range(0, len(tokens) - seqlen + 1, seqlen)]
    count = min(samples, len(pieces))
    pieces = [pieces[i * len(pieces) // count] for i in range(count)]
    if not pieces:
        raise SystemExit(f"error: {text} has {len(tokens)} tokens, fewer than --seqlen {seqlen}")
    mask = torch.ones(1, seqlen, dtype=torch.int64)
    batches = [{"input_ids": torch.tensor([piece]), "attention_mask": mask} for piece in pieces]
    return DataLoader(batches, batch_size=None)


def main() -> None:
    """Read the command line, quantize, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub name of the model in bf16 or fp16")
    parser.add_argument("out", type=Path, help="new folder for the quantized checkpoint")
    parser.add_argument("--scheme", choices=SCHEMES, required=True)
    parser.add_argument("--text", type=Path, required=True, help="calibration text, UTF-8")
    parser.add_argument("--group-size", type=int, default=128, help="of w4a16 (default: 128)")
    parser.add_argument("--samples", type=int, default=128, help="pieces of text (default: 128)")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens a piece (default: 512)")
    args = parser.parse_args()

    from llmcompressor import oneshot  # This takes half a minute, so --help does without.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration = calibration_set(args.text, tokenizer, args.samples, args.seqlen)
    oneshot(model=model, recipe=recipe(args.scheme, args.group_size), dataset=calibration)
    model.save_pretrained(args.out)  # This writes the generation config, too.
    tokenizer.save_pretrained(args.out)
    print(f"saved {args.scheme} to {args.out}")


if __name__ == "__main__":
    main()
