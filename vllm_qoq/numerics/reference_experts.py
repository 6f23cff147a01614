"""What the ops of a mixture of experts mean, in plain PyTorch.

A router gives each token a few experts. Every pair of a token and one of its experts gets a row;
the rows of an expert are neighbours and fill whole tiles, so that a GEMM multiplies each tile with
the weights of one expert. Rows that fill the last tile of an expert up belong to nobody.
"""

from __future__ import annotations

import torch


def most_tiles(pairs: int, experts: int, tile: int) -> int:
    """Say how many tiles of `tile` rows so many pairs fill at most, whatever experts they have."""
    used = min(pairs, experts)
    return min(pairs, (pairs + used * (tile - 1)) // tile)


def route(
    topk_ids: torch.Tensor, expert_map: torch.Tensor | None, experts: int, tile: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay out the rows of all pairs of a token and an expert.

    topk_ids    int32 [tokens, experts of a token], of all experts of the layer
    expert_map  int32 [all experts]: each one's number among those here, or -1; None where all are
    experts     how many are here
    tile        rows of a tile

    Returns the row of each pair, int32 like topk_ids, -1 for an expert that is not here; the expert
    of each tile, int32 [most_tiles]; and the number of tiles, int32 [1].
    """
    all_experts = experts if expert_map is None else len(expert_map)
    ids = topk_ids.flatten().long()
    is_known = (ids >= 0) & (ids < all_experts)
    local = ids.clamp(0, all_experts - 1)
    local = local if expert_map is None else expert_map.long()[local]
    local = torch.where(is_known & (local < experts), local, -1)
    rows = torch.full_like(local, -1)
    tile_expert = torch.zeros(most_tiles(len(ids), experts, tile), dtype=torch.int32)
    tiles = 0
    for expert in local[local >= 0].unique().tolist():
        (pairs,) = torch.where(local == expert)
        rows[pairs] = tiles * tile + torch.arange(len(pairs))
        count = -(-len(pairs) // tile)
        tile_expert[tiles : tiles + count] = expert
        tiles += count
    return (
        rows.view_as(topk_ids).to(torch.int32),
        tile_expert,
        torch.tensor([tiles], dtype=torch.int32),
    )


def combine(y: torch.Tensor, rows: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """Add up the rows of each token, each times its weight, in float32 and in their order.

    y [rows, hidden], rows int32 and topk_weights float32 [tokens, experts of a token]; returns
    [tokens, hidden] in the dtype of y. A row of -1 adds nothing.
    """
    total = torch.zeros(len(rows), y.shape[1])
    for column in range(rows.shape[1]):
        row = rows[:, column].long()
        (tokens,) = torch.where(row >= 0)
        total[tokens] += topk_weights[tokens, column, None] * y[row[tokens]].float()
    return total.to(y.dtype)
