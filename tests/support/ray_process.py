"""Runs engines on a Ray cluster of this machine, also with vLLM's CPU build, which refuses Ray.

That build names no device for Ray to count, and otherwise has all that Ray's executor needs. So the
processes of the cluster find a `sitecustomize` here that names one, and the cluster has as many of
it as there are ranks. `run_on_ray` is for tests; the file itself is the child:
`python tests/support/ray_process.py RAYLETS SPECS OUT`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RANKS = 2
DEVICE_FOR_RAY = """
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

class Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "vllm.platforms.cpu":
            return None
        spec = PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module.CpuPlatform.ray_device_key = "GPU"

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


def run_on_ray(folder: Path, raylets: int, specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Do what `engine_process.run_engines` does on a cluster of so many raylets.

    An error of an engine is a RuntimeError with its last lines.
    """
    hook, results = folder / "hook", folder / "results.json"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(DEVICE_FOR_RAY)
    (folder / "specs.json").write_text(json.dumps(specs))
    here = Path(__file__)
    # What Ray starts has no folder of a script among its paths.
    paths = [str(hook), str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH")]
    done = subprocess.run(
        [sys.executable, here, str(raylets), folder / "specs.json", results],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "RAY_USAGE_STATS_ENABLED": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TORCH_COMPILE_DISABLE": "1",
        },
        capture_output=True,
        text=True,
        timeout=540,
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
    return json.loads(results.read_text())


def main(raylets: int, specs: str, results: str) -> None:
    """Begin the cluster and run every spec on it."""
    import engine_process
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": RANKS, "num_gpus": RANKS // raylets, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    for _ in range(raylets - 1):
        cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=True)
    try:
        engine_process.main(specs, results)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
