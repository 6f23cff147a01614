"""Random experts on a CPU or GPU, and what comes of their tokens exactly."""

import torch

from vllm_qoq.numerics import reference
from vllm_qoq.numerics.packing import pack_nibbles
from vllm_qoq.ops import expert_ops, linear_ops, w4a8_layout

WEIGHTS = ("channel", "g128", "nested")


class Experts:
    """The linear layers of E experts: their packed weights, and the int8 that they stand for.

    use_residual  what `w4a8_gemm_experts` is told of a nested weight
    """

    def __init__(self, experts, n, k, weights, device):
        self.experts, self.n = experts, n
        self.residual = self.use_residual = self.channel_zero = None
        self.workspace = linear_ops.workspace(device) if device.type == "cuda" else None
        self.channel_scale = torch.rand(experts * n, device=device) * 0.02 + 1e-3
        if weights == "channel":
            self.channel_zero = torch.rand(experts * n, device=device) * 0.1 - 0.02
        made = [_expert(n, k, weights, device) for _ in range(experts)]
        self.weight = torch.cat([one["weight"] for one in made])
        self.base_int8 = torch.stack([one["base_int8"] for one in made])
        self.int8 = torch.stack([one["int8"] for one in made])
        if weights == "nested":
            self.residual = torch.cat([one["residual"] for one in made])

    def __call__(self, codes, scale, row_sum, tiles, tile_expert, bias=None, dtype=torch.bfloat16):
        return torch.ops.qoq.w4a8_gemm_experts(
            *(codes, scale, row_sum, tiles, tile_expert, self.experts, self.weight),
            *(self.channel_scale, self.channel_zero, bias, dtype, self.workspace),
            *(self.residual, self.use_residual),
        )

    def expected(self, expert, codes, scale, row_sum, bias=None, dtype=torch.bfloat16):
        """What the rows of one expert are; float64 holds every sum exactly."""
        is_base = self.use_residual is not None and not int(self.use_residual)
        weight = (self.base_int8 if is_base else self.int8)[expert]
        exact = (codes.double() @ weight.double().t()).to(torch.int64).to(torch.int32)
        part = slice(expert * self.n, (expert + 1) * self.n)
        zero = None if self.channel_zero is None else self.channel_zero[part]
        bias = None if bias is None else bias[part]
        return reference.epilogue(
            exact, scale, self.channel_scale[part], row_sum, zero, bias, dtype
        )


def _expert(n, k, weights, device):
    """One expert, in int16 as long as it is made: all of a real layer would take gigabytes."""
    q = torch.randint(0, 16, (n, k), dtype=torch.int16, device=device)
    if weights == "channel":
        int8 = q.to(torch.int8)
        return {"weight": w4a8_layout.pack(pack_nibbles(q)), "base_int8": int8, "int8": int8}
    scale = torch.randint(1, 17, (n, k // 128), dtype=torch.int16, device=device)
    room = torch.rand(scale.shape, device=device) * (256 - 15 * scale)
    offset = room.to(torch.int16) - 128
    w8 = (q.view(n, -1, 128) * scale[..., None] + offset[..., None]).view(n, k)
    groups = scale.to(torch.uint8), offset.to(torch.int8)
    made = {"weight": w4a8_layout.pack(pack_nibbles(q), *groups), "base_int8": w8.to(torch.int8)}
    if weights != "nested":
        return made | {"int8": made["base_int8"]}
    change = torch.randint(-8, 8, w8.shape, dtype=torch.int16, device=device)
    nested = (w8 + change).clamp(-128, 127)
    residual = w4a8_layout.pack(pack_nibbles(nested - w8 + 8))
    return made | {"int8": nested.to(torch.int8), "residual": residual}


def some_ids(kind, tokens, each, experts, device):
    """Experts of tokens: "random", "one" for all, or "few", int32 [tokens, each]."""
    if kind == "one":
        ids = torch.full((tokens, each), experts // 2)
    elif kind == "few":
        ids = torch.randint(0, max(1, experts // 8), (tokens, each)) * 8 % experts
    else:
        ids = torch.rand(tokens, experts).argsort(dim=1)[:, :each]
    return ids.to(torch.int32).to(device)


def run(x, ids, gate_up, down, topk_weights, expert_map=None):
    """The whole layer by its ops; returns all that is between, by name."""
    ops, experts = torch.ops.qoq, gate_up.experts
    tile = expert_ops.tile_for(ids.numel(), experts)
    rows, tile_expert, tiles = ops.route_to_experts(ids, expert_map, experts, tile)
    codes, scale, row_sum = ops.quantize_for_experts(x, rows, tile, tile_expert)
    first = gate_up(codes, scale, row_sum, tiles, tile_expert, dtype=x.dtype)
    inner = ops.silu_and_mul_quantize_experts(first, tiles, tile)
    second = down(*inner, tiles, tile_expert, dtype=x.dtype)
    out = ops.combine_experts(second, rows, topk_weights)
    return {
        **{"rows": rows, "tile": tile, "tile_expert": tile_expert, "tiles": tiles},
        **{"quantized": (codes, scale, row_sum), "gate_up": first, "inner": inner},
        **{"down": second, "out": out},
    }


def assert_exact(found, x, ids, gate_up, down, topk_weights, expert_map=None):
    """Holds every row of `run` against plain arithmetic, and the sum of each token's."""
    rows, tile, used = found["rows"].long(), found["tile"], int(found["tiles"])
    local = ids.long() if expert_map is None else expert_map[ids.long()].long()
    assert torch.equal(rows >= 0, local >= 0)
    at = rows[rows >= 0]
    assert len(at.unique()) == len(at) and (not len(at) or int(at.max()) < used * tile)
    owner = found["tile_expert"].long()
    assert torch.equal(owner[at // tile], local[rows >= 0])
    counts = torch.bincount(local[local >= 0], minlength=gate_up.experts)
    assert used == int(((counts + tile - 1) // tile).sum())

    tokens = torch.arange(len(x), device=x.device)[:, None].expand_as(rows)[rows >= 0]
    # CUDA's PyTorch divides by multiplying, which the kernels do not.
    expected = [part.to(x.device)[tokens] for part in reference.quantize_per_token(x.cpu())]
    for got, right in zip(found["quantized"], expected, strict=True):
        assert torch.equal(got[at], right)
    inner = torch.ops.qoq.silu_and_mul_quantize(found["gate_up"][at])
    for got, right in zip(found["inner"], inner, strict=True):
        assert torch.equal(got[at], right)
    for expert in owner[:used].unique().tolist():
        mine = at[owner[at // tile] == expert]
        quantized = [part[mine] for part in found["quantized"]]
        expected = gate_up.expected(expert, *quantized, dtype=x.dtype)
        assert torch.equal(found["gate_up"][mine], expected)
        inner = [part[mine] for part in found["inner"]]
        assert torch.equal(found["down"][mine], down.expected(expert, *inner, dtype=x.dtype))
    total = torch.zeros(len(x), found["down"].shape[1], device=x.device)
    for column in range(rows.shape[1]):
        row = rows[:, column]
        value = topk_weights[:, column, None] * found["down"][row.clamp(min=0)].float()
        total += torch.where((row >= 0)[:, None], value, 0)
    assert torch.equal(found["out"], total.to(found["out"].dtype))
