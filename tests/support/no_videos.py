"""Models of images in processes that have no torchvision."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.processing_utils import ProcessorMixin, VideosKwargs
from transformers.utils.import_utils import is_torchvision_available


class NoVideos(dict):
    """What stands where a processor has its part for videos, which needs torchvision.

    PyPI's builds of torchvision do not go with the CPU build of torch (.ci/overrides-cpu.txt), so
    transformers reads images with Pillow here. vLLM's module imports torchvision all the same.
    """

    valid_kwargs = VideosKwargs
    # vLLM asks for these, though no video may come.
    size = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}  # noqa: RUF012
    temporal_patch_size = 2

    @classmethod
    def use(cls) -> None:
        """Let vLLM's modules that import torchvision be imported, and processors do without it."""
        if is_torchvision_available():
            return
        place = ""
        names = []
        for name in ("torchvision", "transforms", "v2", "functional"):
            module = ModuleType(place + name)
            if place:
                setattr(sys.modules[place.rstrip(".")], name, module)
            names.append(place + name)
            sys.modules[place + name] = module
            place += f"{name}."
        for module in ("qwen3_vl", "llava"):
            import_module(f"vllm.model_executor.models.{module}")
        for name in names:
            del sys.modules[name]
        AutoVideoProcessor.from_pretrained = lambda *_, **__: cls()
        check = ProcessorMixin.check_argument_for_proper_class

        def check_others(self: ProcessorMixin, name: str, argument: object) -> object:
            return cls if isinstance(argument, cls) else check(self, name, argument)

        ProcessorMixin.check_argument_for_proper_class = check_others
