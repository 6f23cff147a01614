"""Random layers and activations on a GPU, and what the W4A8 GEMM makes of them exactly."""

import math

import torch

from vllm_qoq.numerics import reference
from vllm_qoq.numerics.packing import pack_nibbles
from vllm_qoq.ops import linear_ops, w4a8_layout

DEVICE = torch.device("cuda")
# Weights in groups have their size at the end, and two planes where they are nested.
WEIGHTS = ("channel", "g128", "g64", "g32", "nested g128", "nested g64", "nested g32")


class Layer:
    """A random layer on the GPU: stored tensors, packed weight and the int8 it stands for.

    weights  one of WEIGHTS
    codes    "random", "min", "max", or "unused": group offsets for which codes above 1, which do
             not occur, would leave int8
    """

    def __init__(self, n, k, weights, codes="random"):
        self.n, self.k = n, k
        self.residual = self.use_residual = None
        q = torch.randint(0, 16, (n, k), device=DEVICE)
        q = {"min": q * 0, "max": q * 0 + 15, "unused": q % 2}.get(codes, q)
        self.channel_scale = torch.rand(n, device=DEVICE) * 0.02 + 1e-3
        self.channel_zero = None
        if weights == "channel":
            self.channel_zero = torch.rand(n, device=DEVICE) * 0.1 - 0.02
            self.int8 = q.to(torch.int8)
            self.packed = w4a8_layout.pack(pack_nibbles(q))
            return
        group_size = int(weights.rpartition("g")[2])
        scale = torch.randint(1, 17, (n, k // group_size), device=DEVICE)
        offset = -128 + (torch.rand(scale.shape, device=DEVICE) * (256 - 15 * scale)).long()
        if codes != "random":
            scale.fill_(16)
            offset.fill_({"min": -128, "max": -113, "unused": 100}[codes])
        w8 = (q.view(n, -1, group_size) * scale[..., None] + offset[..., None]).view(n, k)
        assert -128 <= int(w8.min()) <= int(w8.max()) <= 127
        self.int8 = w8.to(torch.int8)
        self.packed = w4a8_layout.pack(
            pack_nibbles(q), scale.to(torch.uint8), offset.to(torch.int8)
        )
        self.base_int8 = self.int8
        if weights.startswith("nested"):
            nested = (w8 + torch.randint(-8, 8, w8.shape, device=DEVICE)).clamp(-128, 127)
            self.int8 = nested.to(torch.int8)
            self.residual = w4a8_layout.pack(pack_nibbles(nested - w8 + 8))

    def arguments(self, x, x_scale, row_sum, bias=None, dtype=torch.bfloat16):
        """The arguments of `w4a8_gemm`."""
        return (
            *(x, x_scale, row_sum, self.packed, self.channel_scale, self.channel_zero),
            *(None, None, bias, dtype, linear_ops.workspace(DEVICE)),
            *(self.residual, self.use_residual),
        )

    def __call__(self, *batch, **options):
        return torch.ops.qoq.w4a8_gemm(*self.arguments(*batch, **options))

    def expected(self, x, x_scale, row_sum, bias=None, dtype=torch.bfloat16):
        """float64 holds every sum exactly."""
        exact = (x.double() @ self.int8.double().t()).to(torch.int64).to(torch.int32)
        return reference.epilogue(
            exact, x_scale, self.channel_scale, row_sum, self.channel_zero, bias, dtype
        )


def tokens(m, k, fill=None):
    """Random activations; all equal to `fill` where it is given."""
    x = torch.randint(-127, 128, (m, k), device=DEVICE, dtype=torch.int8)
    if fill is not None:
        x.fill_(fill)
    return x, torch.rand(m, device=DEVICE) * 0.05 + 1e-3, x.sum(1, dtype=torch.int32)


def poison(m, n, dtype=torch.bfloat16):
    """Leaves NaN in the memory that the allocator hands out next."""
    torch.full((m, n), math.nan, dtype=dtype, device=DEVICE)


def assert_exact(layer, x, **options):
    poison(x[0].shape[0], layer.n, options.get("dtype", torch.bfloat16))
    assert torch.equal(layer(*x, **options), layer.expected(*x, **options))
    assert not linear_ops.workspace(DEVICE).any()
