"""Heads of the float model beside a rotated checkpoint on a GPU: graphs, both model runners."""

import pytest
from engine_process import EAGER, GRAPHS, run_engines
from engines import largest_gap
from rotated_models import Original, write_rotated

from vllm_qoq import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ops.has_kernels("cuda"), reason="this build has no CUDA kernels (VLLM_QOQ_CUDA=1)"
    ),
]


@pytest.mark.parametrize("method", ["eagle", "eagle3", "mtp"])
def test_heads_of_the_original_model_draft_for_a_rotated_one(
    runner, tiny_model, nested_dir, heldout_text, tmp_path, method
):
    """As often right as beside the same sets without the rotation, but for few tokens' noise."""
    text = heldout_text.read_text()
    head = Original(tiny_model, text).write(method, tmp_path / "head")
    rotated = write_rotated(tiny_model, tmp_path / "rotated")
    count = 1 if method == "mtp" else 3
    drafting = {
        "speculative_config": {
            "method": method,
            "model": str(head),
            "num_speculative_tokens": count,
        },
        "hf_overrides": {"num_nextn_predict_layers": 1},  # of the heads of MTP
        "disable_log_stats": False,
    }
    prompts = [text[start : start + 200] for start in range(0, 3200, 400)]
    specs = [
        {
            "checkpoint": str(checkpoint),
            "qoq": {"kv_bits": 4},
            "options": options,
            "prompts": prompts,
            "max_tokens": 60,
        }
        for checkpoint, options in (
            (rotated, EAGER),
            (rotated, EAGER | drafting),
            (rotated, GRAPHS | drafting),
            (nested_dir, EAGER | drafting),
        )
    ]
    plain, eager, graphs, straight = run_engines(tmp_path, specs, **runner)
    assert straight["accepted"] > 50
    for result in (eager, graphs):
        assert result["accepted"] > 0.6 * straight["accepted"]
        assert largest_gap(result["generation"], plain["generation"]) < 0.3
