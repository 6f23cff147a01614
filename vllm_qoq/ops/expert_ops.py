"""The ops of a mixture of experts: rows in the order of experts, and the GEMM over them.

    rows, tile_expert, tiles = route_to_experts(topk_ids, expert_map, experts, tile)
    codes, scale, row_sum = quantize_for_experts(x, rows, tile, tile_expert)
    gate_up = w4a8_gemm_experts(codes, scale, row_sum, tiles, tile_expert, ...)
    codes, scale, row_sum = silu_and_mul_quantize_experts(gate_up, tiles, tile)
    y = w4a8_gemm_experts(codes, scale, row_sum, tiles, tile_expert, ...)
    out = combine_experts(y, rows, topk_weights)

They are for each other, in this order and in one stream: on CUDA a GEMM reads `tiles` and
`tile_expert` before the kernel ahead of it has ended. How many tiles there are is known on the
device alone, so that nothing waits for the router; what is past the last tile is not written. What
they compute is in `vllm_qoq.numerics.reference_experts`.
"""

from __future__ import annotations

import torch

from vllm_qoq.numerics import reference, reference_experts
from vllm_qoq.ops import linear_ops, w4a8_layout
from vllm_qoq.ops.checks import HALVES, check_rows, check_tensor, type_text
from vllm_qoq.ops.library import define

_ROUTE, _QUANTIZE, _SILU = (
    *("route_to_experts", "quantize_for_experts"),
    "silu_and_mul_quantize_experts",
)
_GEMM, _COMBINE = "w4a8_gemm_experts", "combine_experts"
# csrc has these numbers, too: rows of a tile, and the largest sizes.
TILES = (16, 64, 128)
MOST_EXPERTS = 1024
_MOST_PAIRS = 1 << 26
_TILES_TEXT = "16, 64 or 128"
# Rows that an expert has on average, up to which a tile is chosen: most experts then have one tile,
# so that their weights are read once.
_MOST_ROWS = (9, 48)


def tile_for(pairs: int, experts: int) -> int:
    """Choose the rows of a tile for so many pairs of a token and an expert."""
    for most, tile in zip(_MOST_ROWS, TILES, strict=False):
        if pairs <= most * experts:
            return tile
    return TILES[-1]


def route_to_experts(
    topk_ids: torch.Tensor, expert_map: torch.Tensor | None, experts: int, tile: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay out the rows of all pairs of a token and an expert (`reference_experts.route`).

    Which of an expert's rows a token gets is not said; nothing that is computed depends on it.
    """
    if topk_ids.ndim != 2:
        raise ValueError(
            f"{_ROUTE}: topk_ids is {list(topk_ids.shape)}, expected [tokens, experts of a token]"
        )
    if not 0 < experts <= MOST_EXPERTS:
        raise ValueError(f"{_ROUTE}: {experts} experts, expected 1 to {MOST_EXPERTS}")
    _check_tile(_ROUTE, tile)
    if topk_ids.numel() > _MOST_PAIRS:
        raise ValueError(
            f"{_ROUTE}: topk_ids is {list(topk_ids.shape)}, expected at most 2^26 pairs"
        )
    check_tensor(_ROUTE, "topk_ids", topk_ids, torch.int32, *topk_ids.shape, alignment=4)
    if expert_map is not None:
        count = expert_map.numel()
        check_tensor(_ROUTE, "expert_map", expert_map, torch.int32, count, alignment=4)
    return reference_experts.route(topk_ids, expert_map, experts, tile)


def quantize_for_experts(
    x: torch.Tensor, rows: torch.Tensor, tile: int, tile_expert: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize x [tokens, K], bfloat16 or float16, and copy each token to the rows of its experts.

    Returns codes int8 [R, K], scale float32 [R] and row sum int32 [R] (`quantize_per_token`), where
    R is `tile` times the most tiles that there may be. Rows of no token are left as they were.
    """
    check_rows(_QUANTIZE, x, *HALVES)
    if rows.ndim != 2 or tile_expert.ndim != 1:
        raise ValueError(
            f"{_QUANTIZE}: rows is {list(rows.shape)} and tile_expert {list(tile_expert.shape)}, "
            "expected [tokens, experts of a token] and [tiles]"
        )
    _check_tile(_QUANTIZE, tile)
    check_tensor(_QUANTIZE, "rows", rows, torch.int32, x.shape[0], rows.shape[1], alignment=4)
    codes, scale, row_sum = _quantized(x, tile * tile_expert.shape[0], x.shape[1])
    is_here = rows >= 0
    to = rows[is_here].long()
    tokens = torch.arange(x.shape[0])[:, None].expand_as(rows)[is_here]
    for out, found in zip((codes, scale, row_sum), reference.quantize_per_token(x), strict=True):
        out[to] = found[tokens]
    return codes, scale, row_sum


def silu_and_mul_quantize_experts(
    x: torch.Tensor, tiles: torch.Tensor, tile: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute `silu_and_mul_quantize` for the rows of all tiles that there are."""
    check_rows(_SILU, x, *HALVES)
    if x.shape[1] % 2:
        raise ValueError(
            f"{_SILU}: x is {list(x.shape)}, expected gate and up side by side, [M, 2 K]"
        )
    check_tensor(_SILU, "tiles", tiles, torch.int32, 1, alignment=4)
    codes, scale, row_sum = _quantized(x, x.shape[0], x.shape[1] // 2)
    used = int(tiles) * tile
    codes[:used], scale[:used], row_sum[:used] = reference.silu_and_mul_quantize(x[:used])
    return codes, scale, row_sum


def w4a8_gemm_experts(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_row_sum: torch.Tensor,
    tiles: torch.Tensor,
    tile_expert: torch.Tensor,
    experts: int,
    weight: torch.Tensor,
    channel_scale: torch.Tensor,
    channel_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    workspace: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    use_residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `w4a8_gemm` of each tile of rows with the weights of its expert; returns [M, N].

    x, x_scale, x_row_sum  int8 [M, K], float32 [M] and int32 [M]
    tiles                  int32 [1]: how many there are
    tile_expert            int32 [tiles]: whose weights each one is multiplied with
    experts                how many have weights, E
    weight                 int8 [E N, K], or uint8 [E ceil(N / 64), K / 128, bytes]: each expert's
                           as `w4a8_gemm` has it, one after the other, per channel or in groups of
                           128
    channel_scale          float32 [E N]
    channel_zero, bias     float32 [E N], float [E N]
    residual               uint8 [E ceil(N / 64), K / 128, 4096]

    All else is as in `w4a8_gemm`. CUDA takes the packed weight alone, and needs the workspace.
    """
    if x.ndim != 2 or channel_scale.ndim != 1:
        raise ValueError(
            f"{_GEMM}: x is {list(x.shape)} and channel_scale {list(channel_scale.shape)}, "
            "expected [M, K] and [N]"
        )
    if experts <= 0 or channel_scale.shape[0] % experts:
        raise ValueError(
            f"{_GEMM}: channel_scale is {list(channel_scale.shape)}, expected as many channels of "
            f"each of {experts} experts"
        )
    count = tile_expert.shape[0] if tile_expert.ndim == 1 else 0
    tile = x.shape[0] // count if count else 0
    if x.shape[0] and (tile not in TILES or tile * count != x.shape[0]):
        raise ValueError(
            f"{_GEMM}: x is {list(x.shape)} and tile_expert {list(tile_expert.shape)}, expected "
            f"{_TILES_TEXT} rows for each tile"
        )
    is_packed = weight.ndim == 3
    if is_packed and weight.shape[-1] not in map(w4a8_layout.block_bytes, (0, 128)):
        raise ValueError(
            f"{_GEMM}: the weight is {list(weight.shape)}, expected no groups or groups of 128"
        )
    check_tensor(_GEMM, "tiles", tiles, torch.int32, 1, alignment=4)
    check_tensor(_GEMM, "tile_expert", tile_expert, torch.int32, count, alignment=4)
    if out_dtype not in HALVES:
        raise ValueError(f"{_GEMM}: the output is bfloat16 or float16, not {type_text(out_dtype)}")

    def own(values: torch.Tensor, expert: int) -> torch.Tensor:
        return values.view(experts, -1, *values.shape[1:])[expert]

    out = torch.zeros(x.shape[0], channel_scale.shape[0] // experts, dtype=out_dtype)
    for number, expert in enumerate(tile_expert[: int(tiles)].tolist()):
        rows = slice(number * tile, (number + 1) * tile)
        out[rows] = linear_ops.w4a8_gemm(
            x[rows],
            x_scale[rows],
            x_row_sum[rows],
            own(weight, expert),
            own(channel_scale, expert),
            None if channel_zero is None else own(channel_zero, expert),
            None,
            None,
            None if bias is None else own(bias, expert),
            out_dtype,
            residual=None if residual is None else own(residual, expert),
            use_residual=use_residual,
        )
    return out


def combine_experts(
    y: torch.Tensor, rows: torch.Tensor, topk_weights: torch.Tensor
) -> torch.Tensor:
    """Add up the rows of each token with the router's weights (`reference_experts.combine`)."""
    if y.ndim != 2 or rows.ndim != 2:
        raise ValueError(
            f"{_COMBINE}: y is {list(y.shape)} and rows {list(rows.shape)}, expected "
            "[rows, hidden] and [tokens, experts of a token]"
        )
    if y.dtype not in HALVES:
        raise ValueError(f"{_COMBINE}: y is {type_text(y.dtype)}, expected BFloat16 or Half")
    if y.shape[1] % 8:
        raise ValueError(f"{_COMBINE}: y is {list(y.shape)}, expected a multiple of 8 columns")
    check_tensor(_COMBINE, "y", y, y.dtype, *y.shape)
    check_tensor(_COMBINE, "rows", rows, torch.int32, *rows.shape, alignment=4)
    check_tensor(_COMBINE, "topk_weights", topk_weights, torch.float32, *rows.shape, alignment=4)
    return reference_experts.combine(y, rows, topk_weights)


def _check_tile(op: str, tile: int) -> None:
    if tile not in TILES:
        raise ValueError(f"{op}: tiles of {tile} rows, expected {_TILES_TEXT}")


def _quantized(x: torch.Tensor, m: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        x.new_zeros((m, k), dtype=torch.int8),
        x.new_zeros((m,), dtype=torch.float32),
        x.new_zeros((m,), dtype=torch.int32),
    )


def _route_fake(
    topk_ids: torch.Tensor, expert_map: torch.Tensor | None, experts: int, tile: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    most = reference_experts.most_tiles(topk_ids.numel(), experts, tile)
    return torch.empty_like(topk_ids), topk_ids.new_empty((most,)), topk_ids.new_empty((1,))


def _quantize_fake(
    x: torch.Tensor, rows: torch.Tensor, tile: int, tile_expert: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _quantized(x, tile * tile_expert.shape[0], x.shape[1])


def _silu_fake(
    x: torch.Tensor, tiles: torch.Tensor, tile: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _quantized(x, x.shape[0], x.shape[1] // 2)


def _gemm_fake(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_row_sum: torch.Tensor,
    tiles: torch.Tensor,
    tile_expert: torch.Tensor,
    experts: int,
    weight: torch.Tensor,
    channel_scale: torch.Tensor,
    channel_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    workspace: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    use_residual: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], channel_scale.shape[0] // experts), dtype=out_dtype)


def _combine_fake(y: torch.Tensor, rows: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    return y.new_empty((rows.shape[0], y.shape[1]))


_QUANTIZED = "Tensor codes, Tensor scale, Tensor row_sum"
define(
    _ROUTE,
    "(Tensor topk_ids, Tensor? expert_map, int experts, int tile) -> "
    "(Tensor rows, Tensor tile_expert, Tensor tiles)",
    fake=_route_fake,
    cpu=route_to_experts,
)
define(
    _QUANTIZE,
    f"(Tensor x, Tensor rows, int tile, Tensor tile_expert) -> ({_QUANTIZED})",
    fake=_quantize_fake,
    cpu=quantize_for_experts,
)
define(
    _SILU,
    f"(Tensor x, Tensor tiles, int tile) -> ({_QUANTIZED})",
    fake=_silu_fake,
    cpu=silu_and_mul_quantize_experts,
)
define(
    _GEMM,
    "(Tensor x, Tensor x_scale, Tensor x_row_sum, Tensor tiles, Tensor tile_expert, int experts, "
    "Tensor weight, Tensor channel_scale, Tensor? channel_zero, Tensor? bias, "
    "ScalarType out_dtype, Tensor? workspace=None, Tensor? residual=None, "
    "Tensor? use_residual=None) -> Tensor",
    fake=_gemm_fake,
    cpu=w4a8_gemm_experts,
)
define(
    _COMBINE,
    "(Tensor y, Tensor rows, Tensor topk_weights) -> Tensor",
    fake=_combine_fake,
    cpu=combine_experts,
)
