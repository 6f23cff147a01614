"""The ops of a mixture of experts on a CPU: rows, tiles, products and the sum of each token."""

import pytest
import torch
import w4a8_experts as layers

from vllm_qoq.numerics import reference_experts
from vllm_qoq.ops import expert_ops

CPU = torch.device("cpu")


def inputs(tokens, each, experts, kind="random"):
    x = torch.randn(tokens, 128).bfloat16()
    return x, layers.some_ids(kind, tokens, each, experts, CPU), torch.rand(tokens, each)


@pytest.mark.parametrize("weights", layers.WEIGHTS)
@pytest.mark.parametrize(("tokens", "kind"), [(1, "random"), (37, "few"), (70, "one"), (0, "one")])
def test_every_row_is_multiplied_with_its_expert(tokens, kind, weights):
    torch.manual_seed(0)
    gate_up = layers.Experts(8, 256, 128, weights, CPU)
    down = layers.Experts(8, 128, 128, weights, CPU)
    x, ids, topk_weights = inputs(tokens, 2, 8, kind)
    given = (x, ids, gate_up, down, topk_weights)
    layers.assert_exact(layers.run(*given), *given)


def test_experts_of_other_ranks_add_nothing():
    torch.manual_seed(1)
    gate_up, down = (layers.Experts(4, n, 128, "g128", CPU) for n in (256, 128))
    x, ids, topk_weights = inputs(30, 3, 8)
    expert_map = torch.tensor([-1, 2, -1, 0, -1, -1, 3, 1], dtype=torch.int32)
    given = (x, ids, gate_up, down, topk_weights, expert_map)
    found = layers.run(*given)
    layers.assert_exact(found, *given)
    assert (found["rows"] < 0).any()


def test_a_flag_leaves_the_second_plane_out():
    torch.manual_seed(2)
    gate_up, down = (layers.Experts(4, n, 128, "nested", CPU) for n in (256, 128))
    x, ids, topk_weights = inputs(9, 2, 4)
    found = []
    for flag in (0, 1):
        for layer in (gate_up, down):
            layer.use_residual = torch.tensor([flag], dtype=torch.int32)
        given = (x, ids, gate_up, down, topk_weights)
        found.append(layers.run(*given))
        layers.assert_exact(found[-1], *given)
    assert not torch.equal(found[0]["out"], found[1]["out"])


def test_no_distribution_needs_more_tiles_than_there_is_room_for():
    for tile in expert_ops.TILES:
        for pairs, experts in ((1, 8), (7, 2), (200, 8), (64, 64)):
            most = reference_experts.most_tiles(pairs, experts, tile)
            # Where each expert but one has a single row, the most tiles are begun.
            alone = min(pairs, experts) - 1
            worst = torch.cat((torch.arange(alone), torch.full((pairs - alone,), alone)))
            for ids in (worst, torch.zeros(pairs), torch.arange(pairs) % experts):
                found = expert_ops.route_to_experts(
                    ids.to(torch.int32)[:, None], None, experts, tile
                )
                assert int(found[2]) <= most == len(found[1])


def test_an_id_that_no_expert_has_is_left_out():
    ids = torch.tensor([[0, 5], [-1, 1]], dtype=torch.int32)
    rows, _, tiles = expert_ops.route_to_experts(ids, None, 2, 16)
    assert rows.tolist() == [[0, -1], [-1, 16]] and int(tiles) == 2


def test_most_experts_have_one_tile():
    assert [expert_ops.tile_for(pairs, 128) for pairs in (8, 1024, 2048, 65536)] == [
        16,
        16,
        64,
        128,
    ]
