"""Commands in forks of one process that has imported vLLM, which takes 10 s of a processor.

`run` and `Command` stand for `subprocess.run` and `subprocess.Popen` where a test starts Python:
nothing of ours is imported in that process, and what vLLM spawns is forked from the same state. The
file itself is that process: `python tests/support/warm_process.py`.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from multiprocessing import forkserver, spawn, util
from pathlib import Path
from typing import Any

import half_products
import torch

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    *("vllm.entrypoints.cli.main", "vllm.entrypoints.cli.serve"),
    *("vllm.entrypoints.openai.api_server", "vllm.v1.engine.async_llm"),
    *("vllm.v1.engine.core", "vllm.v1.engine.llm_engine", "vllm.v1.executor.multiproc_executor"),
    *("vllm.v1.executor.uniproc_executor", "vllm.v1.worker.cpu_worker"),
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.models.llama",
)
WITHOUT_TORCHVISION = "TESTS_WITHOUT_TORCHVISION"
"""The variable of the environment that lets a command read images without torchvision."""


class Command:
    """A Python command that runs: [sys.executable, "-m", MODULE, ...] or [..., SCRIPT, ...]."""

    def __init__(
        self,
        command: Iterable[object],
        stdout: Path,
        stderr: Path | None = None,
        env: Mapping[str, str] = os.environ,
        cwd: Path = ROOT,
    ) -> None:
        """Begin it, the leader of a session of its own; `stderr` goes to `stdout` by default."""
        self.arguments = [str(part) for part in command]
        if self.arguments[0] == sys.executable:
            self.arguments.pop(0)
        files = [os.devnull, str(stdout), str(stderr or stdout)]
        request = {"arguments": self.arguments, "files": files, "env": dict(env), "cwd": str(cwd)}
        self.pid: int = _ask(request)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        if self.returncode is None:
            self.returncode = _ask({"wait": self.pid})
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit status; TimeoutExpired after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.arguments, timeout)
            time.sleep(0.05)
        return code


def run(
    command: Iterable[object], timeout: float, env: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; TimeoutExpired kills it and what it started.

    With a GPU it is no fork, which CUDA may not survive.
    """
    if torch.cuda.is_available():
        line = [str(part) for part in command]
        return subprocess.run(
            line, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout
        )
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = Command(command, out, err, env)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(
            process.arguments, code, out.read_text(), err.read_text()
        )


def _ask(request: dict[str, Any]) -> Any:
    server = _server()
    assert server.stdin and server.stdout
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The process of this file, begun once; it ends with this process."""
    # vLLM's ranks and samplers compile small functions also where the engine is eager, each rank
    # anew. Only commands with --enforce-eager are run here.
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}
    command = [sys.executable, __file__]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment)


def _serve() -> list[str] | None:
    """Fork what is asked for; in a fork, return the arguments of its command."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in IMPORTED:
        importlib.import_module(module)
    half_products.hasten()
    _override_kernels()
    _sleep_while_idle()
    _ask_models_here()
    gc.collect()
    gc.freeze()  # each engine collects garbage several times, which would go through all of vLLM
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                answers.close()
                _begin(request)
                return request["arguments"]
        print(json.dumps(answer), file=answers, flush=True)
    return None


def _override_kernels() -> None:
    """Do before any fork what each engine would do anew."""
    import once
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        once.kernel_overrides()
        getattr(current_platform, "register_triton_kernel_overrides", lambda: None)()


def _sleep_while_idle() -> None:
    """Let the ranks of an engine wait for each other's messages without a processor.

    vLLM's look for the next one for a second before they sleep: there are more of them than
    processors here. What wakes a rank up is lost now and then, and it looks for itself after 5 s,
    here after 20 ms.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    condition = shm_broadcast.SpinCondition
    initialize = condition.__init__
    condition.__init__ = functools.partialmethod(initialize, busy_loop_s=0)  # type: ignore[method-assign]
    shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = 20


def _ask_models_here() -> None:
    """Let vLLM look at a class of models in the process that asks, as `engines` does."""
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        registry._run_in_subprocess = lambda ask: ask()


def _begin(request: dict[str, Any]) -> None:
    """Give this fork what a new process would have."""
    os.setsid()
    os.chdir(request["cwd"])
    for descriptor, name in enumerate(request["files"]):
        mode = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        opened = os.open(name, mode, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    _set_environment(request["env"])
    random.seed()
    atexit.register(_end)
    if WITHOUT_TORCHVISION in os.environ:
        from no_videos import NoVideos

        NoVideos.use()
    fork_where_vllm_spawns()


def _end() -> None:
    """Let nobody find leaks at the end of a command that fails: its last line is tested.

    Libraries take what is frozen for lost. To go through all of it takes 3 s.
    """
    if hasattr(sys, "last_value"):
        gc.unfreeze()


def _set_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def fork_where_vllm_spawns() -> None:
    """Make a fork server of this state, and all processes of the method `spawn` its forks."""
    listener = socket.socket(socket.AF_UNIX)
    address = os.path.join(util.get_temp_dir(), f"warm-{os.getpid()}")
    listener.bind(address)
    listener.listen()
    alive, ours = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        forkserver.main(listener.detach(), alive, [])
        os._exit(0)
    listener.close()
    os.close(alive)
    server = forkserver._forkserver  # type: ignore[attr-defined]
    server._forkserver_address, server._forkserver_alive_fd = address, ours
    server._forkserver_pid = pid
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: get_context(
        "forkserver" if method == "spawn" else method
    )


def _hand_the_environment_over() -> None:
    """Let forks of a fork server begin with their parent's environment, as spawned ones do."""
    get_preparation_data, prepare = spawn.get_preparation_data, spawn.prepare

    def with_environment(name: str) -> dict[str, Any]:
        return get_preparation_data(name) | {"environment": dict(os.environ)}

    def prepare_with_environment(data: dict[str, Any]) -> None:
        _set_environment(data.pop("environment"))
        prepare(data)

    spawn.get_preparation_data, spawn.prepare = with_environment, prepare_with_environment


def _run(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _hand_the_environment_over()
    if (_arguments := _serve()) is not None:
        _run(_arguments)
