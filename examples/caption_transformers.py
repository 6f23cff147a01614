"""Caption the images of shards with transformers, in batches, and say how fast that is.

    python examples/caption_transformers.py MODEL SHARD... [--batch 64] [--new-tokens 300]

A MODEL without weights gets random ones. Every caption has --new-tokens tokens, the likeliest ones.
One batch runs before the clock is started. Prints a JSON document. `measure_captioning.py` runs
this script beside `vllm-qoq caption`.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_qoq.caption import PROMPT

if TYPE_CHECKING:
    from PIL.Image import Image

_FIRST_BATCH = 256


class Captioner:
    """A model in bf16 and its processor, on a GPU where there is one."""

    def __init__(self, folder: Path, prompt: str, new_tokens: int) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16
        if any(folder.glob("*.safetensors")):
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        else:
            with torch.device(self._device):
                config = AutoConfig.from_pretrained(folder)
                model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        self._model = model.to(self._device).eval()
        self._processor: Any = AutoProcessor.from_pretrained(folder)
        self._processor.tokenizer.padding_side = "left"
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        self._text = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        self._new_tokens = new_tokens

    def caption(self, images: Sequence[Image]) -> list[str]:
        """Caption a batch of images."""
        import torch

        inputs = self._processor(
            text=[self._text] * len(images), images=list(images), padding=True, return_tensors="pt"
        ).to(self._device)
        with torch.inference_mode():
            found = self._model.generate(
                **inputs,
                max_new_tokens=self._new_tokens,
                min_new_tokens=self._new_tokens,
                do_sample=False,
                pad_token_id=self._processor.tokenizer.pad_token_id,
            )
        new = found[:, inputs["input_ids"].shape[1] :]
        if new.shape[1] != self._new_tokens:
            raise RuntimeError(f"{new.shape[1]} tokens where {self._new_tokens} were asked for")
        texts: list[str] = self._processor.batch_decode(new, skip_special_tokens=True)
        return texts


def images_of(shards: Sequence[str]) -> Iterator[Image]:
    """Read the JPEGs of shards, in their order."""
    import webdataset
    from PIL import Image

    for sample in webdataset.WebDataset(list(shards), shardshuffle=False):
        yield Image.open(io.BytesIO(sample["jpg"])).convert("RGB")


def largest_batch(captioner: Captioner, images: Sequence[Image]) -> int:
    """Halve the batch until it fits into the memory of the GPU."""
    import torch

    size = min(_FIRST_BATCH, len(images))
    while True:
        try:
            captioner.caption(images[:size])
            return size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        torch.cuda.empty_cache()  # not in the handler, whose traceback holds the tensors
        size //= 2


def main() -> None:
    """Read the command line, caption, and say how fast."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder; without weights they are random")
    parser.add_argument("shards", nargs="+", metavar="SHARD", help="tar file with JPEGs")
    parser.add_argument("--batch", type=int, help="default: the largest that fits, up to 256")
    parser.add_argument("--images", type=int, help="at most so many (default: all)")
    parser.add_argument("--new-tokens", type=int, default=300, help="a caption (default: 300)")
    parser.add_argument("--prompt", default=PROMPT, help=f"default: {PROMPT!r}")
    args = parser.parse_args()

    captioner = Captioner(args.model, args.prompt, args.new_tokens)
    first = list(itertools.islice(images_of(args.shards), args.batch or _FIRST_BATCH))
    batch = args.batch or largest_batch(captioner, first)
    if args.batch:
        captioner.caption(first)
    started, count = time.perf_counter(), 0
    images = itertools.islice(images_of(args.shards), args.images)
    while some := list(itertools.islice(images, batch)):
        count += len(captioner.caption(some))
    seconds = time.perf_counter() - started
    found = {"images": count, "seconds": seconds, "batch": batch, "tokens": count * args.new_tokens}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
