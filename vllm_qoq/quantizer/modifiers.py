"""The two passes over the calibration text, as modifiers of llmcompressor.

Its sequential pipeline runs the model block by block: it shows a block all inputs,
calls `on_sequential_epoch_end`, and runs the block again with its new weights to
make the inputs of the next one. Only one block has to be on the GPU.

`SmoothPass` observes and smooths (`smooth`). `QuantizePass` measures the Hessians
and quantizes into every set. They are separate because the inputs that the second
one measures, rounded to int8 per token, depend on the smoothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from llmcompressor.modifiers import Modifier
from pydantic import ConfigDict, PrivateAttr

from vllm_qoq.models.names import split_expert
from vllm_qoq.models.table import LayerNames
from vllm_qoq.quantizer import QuantizeError, smooth
from vllm_qoq.quantizer.evaluate import RoundedInputs
from vllm_qoq.quantizer.hessian import HessianSum
from vllm_qoq.quantizer.layers import RoundedLayer, round_layers
from vllm_qoq.quantizer.model import Dimensions, Module, blocks
from vllm_qoq.quantizer.observe import Observer
from vllm_qoq.quantizer.report import LayerError
from vllm_qoq.quantizer.rope import Rope, rope_of
from vllm_qoq.quantizer.sets import SetKind, dequantized
from vllm_qoq.quantizer.weights import assign
from vllm_qoq.quantizer.workdir import WorkDir
from vllm_qoq.quantizer.writer import PieceWriter

if TYPE_CHECKING:
    from llmcompressor.core import Event, State

Done = Callable[[], None]


class _BlockPass(Modifier):
    """The common part of both passes: finding the block of a pipeline step."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    requires_calibration_data: bool = True  # else llmcompressor runs no data and no hooks
    names: LayerNames
    dimensions: Dimensions

    _blocks: list[Module] = PrivateAttr(default_factory=list)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Find the blocks of the model."""
        self._blocks = blocks(state.model, self.names)
        return True

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[Module], **kwargs: Any
    ) -> None:
        """Finish the blocks that this step ran: one, or none for the step of lm_head."""
        seen = set(map(id, modules))
        for index, block in enumerate(self._blocks):
            if id(block.get_submodule(self.names.of_block(index).attention[0])) in seen:
                # Rounding computes in float32, in loops that `products` would slow down.
                with torch._C.DisableTorchFunction():
                    self.finish(index, block)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Remove the hooks of the modifier."""
        self.remove_hooks()

    def finish(self, index: int, block: Module) -> None:
        """Change the weights of a block whose inputs have all been seen."""
        raise NotImplementedError


class SmoothPass(_BlockPass):
    """The pass that watches every block, and finds how to smooth it (`apply_saved`).

    Weights stay as they are while it runs, because llmcompressor has other norms in the model then
    (`pipeline`).
    """

    options: smooth.SmoothOptions
    samples: int
    done: Done

    _observers: dict[int, Observer] = PrivateAttr(default_factory=dict)
    _found: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)
    _ropes: list[Rope | None] = PrivateAttr(default_factory=list)

    @property
    def found(self) -> dict[str, torch.Tensor]:
        """The transforms of all blocks, named INDEX.NAME, for `apply_saved`."""
        return self._found

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Watch the layers of every block."""
        for index, block in enumerate(self._blocks):
            rope = rope_of(state.model, self.names, self.dimensions, index)
            self._ropes.append(rope)
            smoothed = self.names.of_block(index).smoothed
            observer = Observer(self.names, self.dimensions, rope, smoothed, self.samples)
            self._observers[index] = observer
            for name, see in observer.outputs.items():
                self.register_hook(block.get_submodule(name), _output_hook(see), "forward")
            for name, see in observer.inputs.items():
                self.register_hook(block.get_submodule(name), _input_hook(see), "forward_pre")

    def finish(self, index: int, block: Module) -> None:
        """Find the transforms of a block whose inputs have all been seen."""
        seen = self._observers.pop(index).seen()
        _require_finite(seen.tensors(), f"{self.names.blocks}.{index}")
        found = smooth.transforms(
            seen,
            block,
            self.names,
            self.dimensions,
            rope=self._ropes[index],
            options=self.options,
        )
        # A resumed run has them on the CPU, so this one takes them from there, too.
        found = {name: tensor.cpu() for name, tensor in found.items()}
        self._found |= {f"{index}.{name}": tensor for name, tensor in found.items()}
        self.done()


def _require_finite(seen: Iterable[torch.Tensor], place: str) -> None:
    if not all(tensor.isfinite().all() for tensor in seen):
        raise QuantizeError(
            f"{place}: the model computes NaN or infinity there on the calibration text; run it in "
            "bfloat16 (dtype in config.json), or check that it is sound in its own"
        )


def _output_hook(see: Callable[[torch.Tensor], None]) -> Callable[..., None]:
    def hook(module: Module, args: object, output: torch.Tensor) -> None:
        see(output)

    return hook


def _input_hook(see: Callable[[torch.Tensor], None]) -> Callable[..., None]:
    def hook(module: Module, args: tuple[torch.Tensor, ...]) -> None:
        see(args[0])

    return hook


def apply_saved(
    model: Module, found: dict[str, torch.Tensor], names: LayerNames, dimensions: Dimensions
) -> None:
    """Smooth all blocks with what a `SmoothPass` found, in this run or an earlier one."""
    by_block: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in found.items():
        index, _, name = key.partition(".")
        by_block.setdefault(index, {})[name] = tensor
    for number, block in enumerate(blocks(model, names)):
        mine, mlps = by_block.get(str(number), {}), names.of_block(number).mlps
        smooth.apply(block, mine, names, dimensions, mlps)


class QuantizePass(_BlockPass):
    """The pass that quantizes every block into every set.

    sets       the sets; the weights of the last one make the inputs of the next block
    use_gptq   whether rounding errors are passed on, or else weights rounded to the nearest
    clip       whether scales that clip are tried
    passes     of descent after the rounding errors have been passed on
    min_expert_tokens  an expert with fewer tokens is rounded to the nearest
    """

    sets: tuple[SetKind, ...]
    use_gptq: bool
    clip: bool
    passes: int
    min_expert_tokens: int
    work: WorkDir
    done: Done

    _hessians: dict[tuple[int, str], HessianSum] = PrivateAttr(default_factory=dict)
    _input_hooks: list[Any] = PrivateAttr(default_factory=list)
    _writer: PieceWriter = PrivateAttr()

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Round the inputs of every block where a set does, and gather their Hessians."""
        has_int8_inputs = any(kind.has_int8_activations for kind in self.sets)
        rounded = RoundedInputs()
        for index, block in enumerate(self._blocks):
            layers = self.names.of_block(index)
            downs = frozenset(mlp.down for mlp in layers.mlps)
            for group in layers.inputs:
                for name in group if has_int8_inputs else ():
                    # This is an ordinary hook: unlike the modifier's own, it also acts while the
                    # pipeline makes the inputs of the next block.
                    layer = block.get_submodule(name)
                    self._input_hooks.append(layer.register_forward_pre_hook(rounded))
                if not self.work.has(piece(index)):
                    hook = self._hessian_hook(index, group[0], is_last=group[0] in downs)
                    self.register_hook(block.get_submodule(group[0]), hook, "forward_pre")

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Remove all hooks."""
        super().on_calibration_end(state, event, **kwargs)
        for hook in self._input_hooks:
            hook.remove()

    def model_post_init(self, context: Any, /) -> None:
        """Make the writer, which `close` ends."""
        super().model_post_init(context)
        self._writer = PieceWriter(self.work)

    def close(self) -> None:
        """Wait until all pieces are stored."""
        self._writer.close()

    def finish(self, index: int, block: Module) -> None:
        """Quantize a block, unless that is done already, and give it the last set's weights."""
        name = piece(index)
        if self.work.has(name):
            layers = self.names.of_block(index).linears
            for layer, weight in dequantized(self.work.load(name), self.sets[-1], layers):
                _assign_weight(block, layer, weight)
        else:
            self._writer.save(name, *self._quantize(index, block))
        self.done()

    def _quantize(
        self, index: int, block: Module
    ) -> tuple[dict[str, torch.Tensor], list[LayerError]]:
        """Quantize a block: its tensors by SET.LAYER.LEAF, and rows of the report."""
        tensors: dict[str, torch.Tensor] = {}
        errors: list[LayerError] = []
        for group in self.names.of_block(index).inputs:
            seen = self._hessians.pop((index, group[0]), None)
            found, rows = self._quantize_group(f"{self.names.blocks}.{index}.", block, group, seen)
            tensors |= found
            errors += rows
        return tensors, errors

    def _quantize_group(
        self, prefix: str, block: Module, group: tuple[str, ...], seen: HessianSum | None
    ) -> tuple[dict[str, torch.Tensor], list[LayerError]]:
        """Quantize the layers of `block` with one input, and give them the last set's weights.

        Grids take several bytes a weight, so those of one group are gone before the next.
        """
        tensors: dict[str, torch.Tensor] = {}
        errors: list[LayerError] = []
        weights = {prefix + name: block.get_submodule(name).weight.data for name in group}
        rounded = self._round(weights, seen)
        for name in group:
            dtype, bias = weights[prefix + name].dtype, block.get_submodule(name).bias
            for one in rounded[prefix + name]:
                stored = one.grid.tensors(dtype)
                if bias is not None:
                    stored["bias"] = bias.data
                tensors |= {f"{one.kind.name}.{name}.{leaf}": t for leaf, t in stored.items()}
                errors.append(one.row)
            _assign_weight(block, name, one.grid.dequantized())
        return tensors, errors

    def _round(
        self, weights: Mapping[str, torch.Tensor], seen: HessianSum | None
    ) -> dict[str, list[RoundedLayer]]:
        """Round layers with one input, of an expert with few tokens to the nearest.

        seen  what their inputs were; None for an expert that no token went through
        """
        first, weight = next(iter(weights.items()))
        tokens = seen.tokens if seen is not None else 0
        is_expert = split_expert(first) is not None
        is_starved = self.use_gptq and is_expert and tokens < self.min_expert_tokens
        # Of an expert that saw nothing the error is that over inputs alike in all directions.
        if seen is not None:
            hessian = seen.take_mean()
        else:
            hessian = torch.eye(weight.shape[1], device=weight.device)
        _require_finite([hessian], first)
        use_gptq = self.use_gptq and not is_starved
        found = round_layers(weights, hessian, self.sets, use_gptq, self.clip, self.passes)
        for one in (one for layer in found.values() for one in layer) if is_expert else ():
            one.row["tokens"] = tokens
            if is_starved:
                one.row["rounded_to_nearest"] = True
        return found

    def _hessian_hook(self, index: int, name: str, is_last: bool) -> Callable[..., object]:
        def hook(module: Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
            x = args[0]
            if (index, name) not in self._hessians:
                self._hessians[index, name] = HessianSum(x.shape[-1], x.device)
            self._hessians[index, name].add(x)
            # Nobody reads what the block makes of this run, so its last layer computes one token,
            # which stands for all.
            return (x[..., :1, :],) if is_last else None

        return hook


def piece(index: int) -> str:
    """The name of a block's results in the work folder."""
    return f"block-{index:04d}"


def _assign_weight(block: Module, name: str, weight: torch.Tensor) -> None:
    layer = block.get_submodule(name)
    assign(layer, "weight", weight.to(layer.weight.device))
