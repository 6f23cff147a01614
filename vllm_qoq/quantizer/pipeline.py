"""llmcompressor's sequential pipeline: calibration text runs through a model block by block."""

from __future__ import annotations

from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from vllm_qoq.quantizer.model import Module
from vllm_qoq.quantizer.weights import assign

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier
    from transformers import PreTrainedTokenizerBase


_NORM = "norm.weight"


def bring_to_gpu_when_used(model: Module) -> None:
    """Make the layers of a model in the CPU's memory run on the GPU, where there is one."""
    from compressed_tensors.offload import set_onload_device

    if torch.cuda.is_available():
        set_onload_device(model, torch.device("cuda"))


def run(
    model: Module,
    step: Modifier,
    samples: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    propagate: bool,
) -> None:
    """Run calibration text, pieces of token ids, through the model block by block.

    propagate  whether every block runs a second time, as `step` leaves it, for the next one's
               inputs

    Meanwhile norms that multiply by 1 + weight are other modules, which hold the sum. So `step` may
    not change norms, and this puts their weights back as they were: llmcompressor's have been
    rounded twice.
    """
    from llmcompressor import oneshot

    batches: Any = [
        {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens)).long()}
        for tokens in samples
    ]
    # The order is always this one: a resumed run must see the same.
    data: Any = torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False)
    norms = {n: t.data.clone() for n, t in model.named_parameters() if n.endswith(_NORM)}
    with TemporaryDirectory() as folder:
        # oneshot looks on the disk whether a model is quantized, and the files of one that was
        # dequantized for this say so.
        model.config.save_pretrained(folder)
        model.config.name_or_path = folder
        # With a tokenizer given, oneshot loads no processor from the folder, nor code of one.
        oneshot(
            model=model,
            recipe=[step],
            dataset=data,
            pipeline="sequential",
            tokenizer=tokenizer,
            propagate_error=propagate,
            # What goes from block to block stays where the blocks run.
            sequential_offload_device="cuda" if torch.cuda.is_available() else "cpu",
        )
    for name, value in norms.items():
        layer, _, leaf = name.rpartition(".")
        assign(model.get_submodule(layer), leaf, value)
