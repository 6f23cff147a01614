"""Engines whose ranks are actors of Ray; they run where Ray is installed beside vLLM.

CI does without it: its wheel has 70 MB, and each test starts every rank anew.
"""

import json
from importlib.util import find_spec

import pytest
from engine_process import run_engines
from ray_process import run_on_ray

ROUTED = {"routing": {"prefill": "w8a8", "decode": "w4a8"}, "kv_bits": 4}
TWO_RANKS = {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 32 << 20}

pytestmark = pytest.mark.skipif(
    find_spec("ray") is None, reason="ray is not installed; CONTRIBUTING.md says how"
)


@pytest.mark.parametrize("raylets", [1, 2])
def test_ranks_on_ray_answer_as_processes_do(nested_dir, tmp_path, raylets):
    """With two raylets each has one rank, as with two machines; both count on this host."""
    spec = {"checkpoint": str(nested_dir), "qoq": ROUTED}
    (split,) = run_engines(
        tmp_path, [spec | {"options": TWO_RANKS}], VLLM_CPU_OMP_THREADS_BIND="0|1"
    )
    options = TWO_RANKS | {"distributed_executor_backend": "ray"}
    (on_ray,) = run_on_ray(tmp_path, raylets, [spec | {"options": options}])
    # JSON has no tuples, and only strings as keys.
    assert on_ray["generation"] == json.loads(json.dumps(split["generation"]))
    steps = {key: n for key, n in on_ray["counts"].items() if n}
    assert steps == {"prefill w8a8": 1, "decode w4a8": 11}


def test_a_load_is_refused_on_ray(nested_dir, tmp_path):
    load = {"enter": 2, "leave": 1, "decode": "w4a8", "prefill": "w4a8"}
    routing = {"prefill": "w8a8", "decode": "w8a8", "load": load}
    options = TWO_RANKS | {"distributed_executor_backend": "ray"}
    spec = {"checkpoint": str(nested_dir), "qoq": {"routing": routing}, "options": options}
    with pytest.raises(RuntimeError, match="the Ray executor may put ranks on several hosts"):
        run_on_ray(tmp_path, 1, [spec])
