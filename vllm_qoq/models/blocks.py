"""The layers of a decoder block by what they do: attention, and an MLP or a mixture of experts.

All names are below the block (`model.layers.3`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mlp:
    """The linear layers of an MLP, down(activation(gate(x)) * up(x)).

    Where one layer does the work of gate and up, they have one name.
    """

    gate: str
    up: str
    down: str

    @property
    def readers(self) -> tuple[str, ...]:
        """List the layers that read the input."""
        return tuple(dict.fromkeys((self.gate, self.up)))

    def below(self, parent: str) -> Mlp:
        """Name the layers of an MLP that is the module `parent`."""
        return Mlp(f"{parent}.{self.gate}", f"{parent}.{self.up}", f"{parent}.{self.down}")


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture of experts, which a block has in place of an MLP.

    experts  in the order of their numbers
    shared   the MLPs that every token goes through besides
    routers  the layers that stay in float: the router, and what weights a shared expert
    each     the number of experts that a token goes through
    """

    experts: tuple[Mlp, ...]
    shared: tuple[Mlp, ...]
    routers: tuple[str, ...]
    each: int


@dataclass(frozen=True, slots=True)
class LinearAttention:
    """What some blocks have in place of attention: a state of one size, which each token changes.

    readers  the layers that are quantized and read what the norm gives
    floats   those that read it and stay in float: a few outputs, which decide what the state keeps
    norm     the norm of what a head gives, whose weight is the same for all heads and multiplies
             the inputs of o
    o        what writes to the stream
    kept     the tensors that no step changes, in the precision in which a model has them
    """

    readers: tuple[str, ...]
    floats: tuple[str, ...]
    norm: str
    o: str
    kept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockNames:
    """The layers of one block.

    attention_norm, mlp_norm  the norms in front of attention and MLPs; None where they read the
                              stream as it is
    attention                 what reads the input of attention: q, k and v, or one layer for them
    o                         what attention writes with
    mlps                      the MLP, or all experts and what every token goes through besides
    routers                   the layers in float that read what the MLPs read
    expert_share              the share of tokens that an expert computes if all get the same number
    has_keys                  whether attention has keys and values, which linear attention has not
    attention_floats          the layers in float that read what attention reads
    """

    attention_norm: str | None
    mlp_norm: str | None
    attention: tuple[str, ...]
    o: str
    mlps: tuple[Mlp, ...]
    routers: tuple[str, ...] = ()
    expert_share: float = 1.0
    has_keys: bool = True
    attention_floats: tuple[str, ...] = ()

    @property
    def norms(self) -> dict[str, tuple[str, ...]]:
        """Map each norm to the layers that read it."""
        found: dict[str, tuple[str, ...]] = {}
        for norm, readers in (
            (self.attention_norm, self._attention_readers),
            (self.mlp_norm, self._mlp_readers),
        ):
            if norm is not None:
                found[norm] = (*found.get(norm, ()), *readers)
        return found

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """List groups of quantized layers that read one tensor, in the order in which they run.

        It is what a norm gives or the stream, the output of the attention, or the inner product of
        an MLP. An expert reads its tokens, and so has inputs of its own.
        """
        of_mlps = (group for mlp in self.mlps for group in (mlp.readers, (mlp.down,)))
        return (self.attention, (self.o,), *of_mlps)

    @property
    def smoothed(self) -> tuple[str, ...]:
        """List the layers whose inputs get scales: all down, and what linear attention writes with.

        The inputs of any other o get those of the values.
        """
        return (*(() if self.has_keys else (self.o,)), *(mlp.down for mlp in self.mlps))

    @property
    def linears(self) -> tuple[str, ...]:
        """List all quantized layers."""
        return tuple(name for group in self.inputs for name in group)

    @property
    def stream_writers(self) -> tuple[str, ...]:
        """List the layers that write to the residual stream."""
        return (self.o, *(mlp.down for mlp in self.mlps))

    @property
    def _attention_readers(self) -> tuple[str, ...]:
        return (*self.attention, *self.attention_floats)

    @property
    def _mlp_readers(self) -> tuple[str, ...]:
        return (*(name for mlp in self.mlps for name in mlp.readers), *self.routers)
