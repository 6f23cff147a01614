"""The way from a layer that is being built to its model and to what is between.

A quantization method is asked for layers while they are built, and never meets the modules that
they will belong to. But the constructors of these are running then, the model's outermost of all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from torch import nn


def model_in_the_making() -> nn.Module | None:
    """Find the outermost module whose constructor this thread is in, None outside of any."""
    *_, outermost = (None, *_in_the_making())
    return outermost


def owner_in_the_making(layer: nn.Module) -> nn.Module | None:
    """Find the module whose constructor is building `layer`, None outside of any."""
    return next((module for module in _in_the_making() if module is not layer), None)


def _in_the_making() -> Iterator[nn.Module]:
    """List the modules whose constructors this thread is in, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__init__":
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                yield module
        frame = frame.f_back
