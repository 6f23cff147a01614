"""The way from a layer that is being built to its model.

A quantization method is asked for layers while they are built, and never meets the model that they
will belong to. But the constructor of that model is running then, outermost of all modules.
"""

from __future__ import annotations

import sys
from types import FrameType

from torch import nn


def model_in_the_making() -> nn.Module | None:
    """Find the outermost module whose constructor this thread is in, None outside of any."""
    found: nn.Module | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__init__":
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                found = module
        frame = frame.f_back
    return found
