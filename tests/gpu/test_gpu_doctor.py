"""`vllm-qoq doctor` on a GPU: every kernel gives what its reference gives."""

import pytest

from vllm_qoq import ops
from vllm_qoq.doctor.probe import probe
from vllm_qoq.ops import library

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ops.has_kernels("cuda"), reason="this build has no CUDA kernels (VLLM_QOQ_CUDA=1)"
    ),
]


def test_all_kernels_are_tried_and_right_on_each_gpu():
    found = probe()
    assert found["is_loaded"] and not found["missing_ops"] and found["gpus"]
    for gpu in found["gpus"]:
        assert (gpu["fault"], gpu["wrong"]) == (None, [])
        assert set(gpu["tried"]) == set(library._ops["cuda"])
