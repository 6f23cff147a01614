"""`vllm-qoq bench gemm` without a GPU: made-up results, refused peers, mistakes of users."""

import contextlib
import json
import math
import subprocess
import sys
from unittest import mock

import pytest
import torch
from bench_units import bench_command, cells
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_qoq import kernel_library, ops, plots
from vllm_qoq.bench import BenchError, int8_rate, measure, peers, plot, report, result, roofline
from vllm_qoq.bench.attempts import Attempts
from vllm_qoq.bench.cases import KERNELS, OURS, PEERS, SHAPES, TIMED_TOKENS, Case
from vllm_qoq.cli import bench as bench_cli
from vllm_qoq.cli import measurement as command
from vllm_qoq.measuring import gpu as timing
from vllm_qoq.ops import linear_ops

MODEL, TOKENS = "llama-3-8b", (1, 64)
INT8_RATE = roofline.Int8Rate(2e15, "made up")
PACKAGES = {"torch": "2.11.0", "vllm": "0.26.0", "humming-kernels": None}


def seconds_of(case, kernel):
    """Ours takes 10 us, the k-th peer 10 + k us, all M times as long with M tokens."""
    return 1e-5 * case.m * (1 if kernel in OURS else 1 + (1 + list(PEERS).index(kernel)) / 10)


def made_up(kernels=KERNELS, tokens=TOKENS, without=()):
    """A result; `without` lists (kernel, layer, m) that were left out."""
    times = {}
    for m in tokens:
        for layer, (n, k) in zip(("qkv", "o", "gate_up", "down"), SHAPES[MODEL], strict=True):
            case = Case(layer, n, k, m)
            names = [name for name in kernels if (name, layer, m) not in without]
            times[case] = {name: seconds_of(case, name) for name in names}
    left_out = [result.LeftOut(name, f"{layer} M={m}", "too odd") for name, layer, m in without]
    return result.Result(
        model=MODEL,
        device="Some GPU",
        environment={"packages": PACKAGES, "cuda": "13.0"},
        copy_rate=4e12,
        int8_rate=INT8_RATE,
        tokens=tuple(tokens),
        kernels=tuple(kernels),
        seconds=times,
        left_out=tuple(left_out),
    )


@pytest.fixture
def run(monkeypatch, capfd):
    """run(ARGUMENTS): exit code, stdout and stderr of `vllm-qoq bench gemm`, on a made-up GPU."""
    monkeypatch.setattr(ops, "has_kernels", lambda device: True)
    monkeypatch.setattr(measure, "measure", lambda model, tokens, kernels, quiet: made_up(kernels))
    return bench_command("gemm", monkeypatch, capfd)


# Results


def test_floor_is_the_longer_of_memory_and_tensor_cores():
    small, large = Case("o", 4096, 4096, 1), Case("o", 4096, 4096, 4096)
    moved = 4096 * 4096 * 4.125 / 8 + 4096 + 2 * 4096
    assert roofline.bytes_moved(small, 4.125) == moved
    assert roofline.floor_seconds("qoq-g128", small, 4e12, 2e15) == moved / 4e12
    assert roofline.floor_seconds("qoq-channel", small, 4e12, 2e15) < moved / 4e12
    assert roofline.floor_seconds("qoq-g128", large, 4e12, 2e15) == 2 * 4096**3 / 2e15


def test_speed_is_the_geometric_mean_over_the_layers():
    found = made_up()
    case = found.cases(1)[0]
    found.seconds[case]["cutlass-int8"] = 16 * seconds_of(case, "cutlass-int8")
    speeds = result.speedups(found)
    assert speeds["cutlass-int8"] == pytest.approx([2 * 1.2, 1.2])
    assert speeds["humming-g128"] == pytest.approx([1.8, 1.8])
    # There cutlass-fp8 is the best; cublas-bf16 is faster, but no 8-bit kernel.
    best = math.exp((math.log(1.3) + 3 * math.log(1.2)) / 4)
    assert speeds["best W4A8 or W8A8 peer"] == pytest.approx([best, 1.2])


def test_speed_is_unknown_where_a_layer_is_missing():
    without = [("humming-g128", "o", 1), ("qoq-g128", "down", 64)]
    speeds = result.speedups(made_up(without=without))
    assert speeds["humming-g128"] == [None, None]
    assert speeds["cutlass-int8"] == [pytest.approx(1.2), None]
    assert speeds["cutlass-int8 / qoq-nested"] == [pytest.approx(1.2)] * 2
    assert result.speedups(made_up(kernels=["cublas-bf16"])) == {}
    alone = result.speedups(made_up(kernels=["qoq-g128"]))
    assert set(map(str, alone.values())) == {"[None, None]"}


def test_report_has_a_table_per_layer_and_says_how_it_was_measured():
    text = report.markdown(made_up())
    assert cells(text, "o, N=4096 K=4096", "qoq-g128") == ["10.0", "640.0"]
    assert cells(text, "o, N=4096 K=4096", "humming-channel") == ["19.0", "1216.0"]
    assert cells(text, "o, N=4096 K=4096", "qoq-g128, TOPS") == ["3", "3"]
    assert cells(text, "o, N=4096 K=4096", "qoq-g128, TB/s") == ["0.87", "0.01"]
    assert cells(text, "o, N=4096 K=4096", "qoq-g128, share of the floor") == ["22%", "0%"]
    assert cells(text, "qoq-g128 against its peers", "cutlass-int8") == ["1.20", "1.20"]
    assert "4.00 TB/s in this run" in text and "2000 TOPS, the int8 rate\n(made up" in text
    assert "vllm 0.26.0" in text and "humming-kernels" not in text
    assert "vllm-qoq bench gemm --model llama-3-8b --tokens 1,64\n" in text
    assert "Left out" not in text


def test_report_shows_what_was_left_out_as_a_dash_and_why():
    without = [("machete-w4a16", "o", 1), ("machete-w4a16", "down", 1), ("qoq-channel", "o", 64)]
    text = report.markdown(made_up(without=without))
    assert cells(text, "o, N=4096 K=4096", "machete-w4a16") == ["-", "1024.0"]
    assert cells(text, "o, N=4096 K=4096", "qoq-channel, TB/s")[1] == "-"
    assert "- machete-w4a16, o M=1; down M=1: too odd\n" in text


def test_json_has_every_number_and_null_for_what_is_missing():
    document = result.to_json(made_up(without=[("machete-w4a16", "qkv", 1)]))
    assert json.loads(json.dumps(document)) == document
    case = document["cases"][0]
    assert (case["layer"], case["n"], case["k"], case["m"]) == ("qkv", 6144, 4096, 1)
    assert case["microseconds"]["machete-w4a16"] is None
    assert case["microseconds"]["qoq-g128"] == pytest.approx(10)
    assert case["ours"]["qoq-g128"]["share_of_floor"] == pytest.approx(
        case["ours"]["qoq-g128"]["floor_microseconds"] / 10
    )
    assert document["left_out"] == [
        {"kernel": "machete-w4a16", "where": "qkv M=1", "reason": "too odd"}
    ]


@pytest.mark.parametrize("without", [(), [("qoq-g128", "o", 1), ("cutlass-int8", "o", 1)]])
@pytest.mark.parametrize("kernels", [KERNELS, ("qoq-g128",), ("cublas-bf16",)])
def test_plot_takes_what_was_measured(tmp_path, kernels, without):
    pytest.importorskip("matplotlib")
    plot.save(made_up(kernels, without=without), tmp_path / "gemm.png")
    assert (tmp_path / "gemm.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "slower, said",
    [(0.5, "is 2.40x as fast as the"), (1.2, "(1.00x)"), (1.5, "is slower than the")],
)
def test_the_title_of_the_plot_states_the_ratio_also_when_we_lose(slower, said):
    pytest.importorskip("matplotlib")
    found = made_up()
    for times in found.seconds.values():
        times["qoq-g128"] *= slower
    assert said in plots.title_of(plot.figure(found, plot.ratios(found)))


# The command


def test_output_has_three_files_and_is_replaced_only_when_asked(run, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    code, stdout, _ = run("-o", out)
    assert code == 0 and stdout.endswith(f"wrote {out}\n")
    assert sorted(path.name for path in out.iterdir()) == ["gemm.json", "gemm.md", "gemm.png"]
    assert (out / "gemm.md").read_text() in stdout
    assert json.loads((out / "gemm.json").read_text())["model"] == MODEL
    code, stdout, stderr = run("-o", out)
    assert (code, stdout) == (2, "") and f"{out}: exists already" in stderr
    (out / "gemm.md").write_text("old")
    assert run("-o", out, "--overwrite")[0] == 0
    assert (out / "gemm.md").read_text() != "old" and list(tmp_path.iterdir()) == [out]
    (out / "photo.jpg").touch()
    code, _, stderr = run("-o", out, "--overwrite")
    assert code == 2 and "photo.jpg" in stderr and (out / "photo.jpg").exists()


def test_json_is_alone_on_stdout(run):
    code, stdout, _ = run("--json", "--kernels", "cutlass-int8,qoq-g128")
    assert code == 0 and json.loads(stdout)["kernels"] == ["qoq-g128", "cutlass-int8"]


def test_an_interrupt_leaves_nothing_behind(run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(plot, "save", stop)
    code, stdout, stderr = run("-o", tmp_path / "out")
    assert code == 130 and "wrote" not in stdout and "interrupted" in stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "gpt-2"], "invalid choice: 'gpt-2'"),
        (["--tokens", "16,0"], "'16,0' is not a list of positive numbers"),
        (["--tokens", ""], "'' is not a list"),
        (["--kernels", "qoq-g128,marlin"], "'marlin' is not a kernel; choose from qoq-g128"),
    ],
)
def test_bad_arguments_name_the_value(run, arguments, message):
    code, stdout, stderr = run(*arguments)
    assert (code, stdout) == (2, "") and message in stderr


def test_tokens_and_kernels_are_put_in_order():
    assert bench_cli.tokens("64,1,64") == (1, 64)
    assert command.kernels_of(KERNELS)("humming-g128,qoq-g128") == ("qoq-g128", "humming-g128")


def test_what_is_missing_is_said_before_work_begins(run, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "measure", None)
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    code, _, stderr = run("-o", tmp_path / "out")
    assert code == 2 and "pip install 'vllm-qoq[plots]'" in stderr
    code, _, stderr = run("-o", tmp_path / "no" / "out")
    assert code == 2 and "no such folder" in stderr
    monkeypatch.setattr(ops, "has_kernels", lambda device: False)
    code, _, stderr = run()
    assert code == 2 and kernel_library.BUILD in stderr
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    code, _, stderr = run()
    assert code == 2 and "Some GPU has compute capability 7.5" in stderr and "build" not in stderr
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, stderr = run("--kernels", "cutlass-int8")
    assert code == 2 and "no NVIDIA GPU" in stderr


def test_peers_alone_need_no_kernels_of_ours(run, monkeypatch):
    monkeypatch.setattr(ops, "has_kernels", lambda device: False)
    assert run("--kernels", ",".join(PEERS))[0] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_command_says_so():
    command = [sys.executable, "-m", "vllm_qoq.cli", "bench", "gemm"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: torch finds no NVIDIA GPU"), done.stderr


def test_help_imports_no_torch():
    code = (
        "import sys\n"
        "from vllm_qoq.cli.main import main\n"
        "sys.argv = ['vllm-qoq', 'bench', 'gemm', '--help']\n"
        "try: main()\n"
        "finally: assert not {'torch', 'vllm', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = "".join(done.stdout.split())  # lines may break within a name
    assert all(name in said for name in KERNELS)


# Measuring


@pytest.fixture
def no_gpu(monkeypatch):
    """A kernel's "call" is (kernel, N, K, M); timing it appends it to what this returns."""
    timed = []

    def preparation(name):
        return lambda n, k: lambda m: [(name, n, k, m)]

    def seconds(calls):
        timed.extend(calls)
        name, n, k, m = calls[0]
        return seconds_of(Case("", n, k, m), name)

    monkeypatch.setattr(peers, "PREPARE", {name: preparation(name) for name in KERNELS})
    monkeypatch.setattr(peers, "COMPILE", {})
    monkeypatch.setattr(timing, "seconds", seconds)
    monkeypatch.setattr(timing, "copy_rate", lambda: 4e12)
    monkeypatch.setattr(measure, "int8_rate", lambda: INT8_RATE)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    return timed


def refuse(message, error=RuntimeError):
    def work(*_):
        raise error(message)

    return work


def test_the_kernels_of_a_case_are_measured_together_in_changing_order(no_gpu):
    found = measure.measure(MODEL, TOKENS, KERNELS, quiet=True)
    assert found.seconds == made_up().seconds and not found.left_out
    groups = [no_gpu[i : i + len(KERNELS)] for i in range(0, len(no_gpu), len(KERNELS))]
    assert all(len({call[1:] for call in group}) == 1 for group in groups)
    orders = [tuple(call[0] for call in group) for group in groups]
    assert len(set(orders)) == len(orders) == 8
    assert all(sorted(order) == sorted(KERNELS) for order in orders)


def test_a_peer_that_is_not_installed_is_left_out_once(no_gpu, monkeypatch, capsys):
    missing = refuse("No module named 'humming'", ModuleNotFoundError)
    monkeypatch.setitem(peers.PREPARE, "humming-g128", missing)
    monkeypatch.setitem(peers.PREPARE, "humming-channel", missing)
    monkeypatch.setitem(peers.COMPILE, "humming-channel", missing)
    found = measure.measure(MODEL, TOKENS, KERNELS, quiet=True)
    reason = "ModuleNotFoundError: No module named 'humming'"
    assert [str(one) for one in found.left_out] == [
        f"humming-channel, everywhere: {reason}",
        f"humming-g128, everywhere: {reason}",
    ]
    assert capsys.readouterr().err.count("left out: humming-g128, everywhere") == 1
    assert cells(report.markdown(found), "o, N=4096 K=4096", "humming-g128") == ["-", "-"]


def test_a_peer_that_refuses_a_shape_is_left_out_there(no_gpu, monkeypatch, capsys):
    prepare = peers.PREPARE["machete-w4a16"]

    def machete(n, k):
        return refuse("N must be odd\nand so on") if n == 6144 else prepare(n, k)

    def marlin(n, k):
        raise AssertionError

    monkeypatch.setitem(peers.PREPARE, "machete-w4a16", machete)
    monkeypatch.setitem(peers.PREPARE, "marlin-w4a16", marlin)
    found = measure.measure(MODEL, TOKENS, KERNELS, quiet=True)
    text = report.markdown(found)
    assert cells(text, "qkv, N=6144 K=4096", "machete-w4a16") == ["-", "-"]
    assert cells(text, "o, N=4096 K=4096", "machete-w4a16") == ["16.0", "1024.0"]
    assert cells(text, "o, N=4096 K=4096", "marlin-w4a16") == ["-", "-"]
    places = "N=6144 K=4096 M=1; N=6144 K=4096 M=64"
    assert f"- machete-w4a16, {places}: RuntimeError: N must be odd\n" in text
    printed = capsys.readouterr().err
    assert printed.count("left out: machete-w4a16, N=6144 K=4096 M=1: RuntimeError: N") == 1
    assert printed.count("machete-w4a16") == 1 and "marlin-w4a16, N=6144 K=4096: Asse" in printed


def test_what_does_not_compile_is_reported_where_it_is_used(no_gpu, monkeypatch):
    compiled = []
    jobs = [refuse("nvcc failed"), lambda: compiled.append(1)]
    monkeypatch.setitem(peers.COMPILE, "humming-g128", lambda shapes, tokens: jobs)
    found = measure.measure(MODEL, TOKENS, KERNELS, quiet=True)
    assert compiled == [1] and not found.left_out


def test_a_failure_of_our_own_kernel_is_raised(no_gpu, monkeypatch):
    monkeypatch.setitem(peers.PREPARE, "qoq-channel", refuse("illegal instruction"))
    with pytest.raises(RuntimeError, match="illegal instruction"):
        measure.measure(MODEL, TOKENS, KERNELS, quiet=True)


def test_a_peer_that_breaks_the_gpu_ends_the_run_with_the_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", refuse("an illegal memory access"))
    with pytest.raises(BenchError, match="leave the kernel out: --kernels qoq-g128,") as raised:
        Attempts().run("cutlass-fp8", "N=1 K=1 M=1", refuse("an illegal memory access"))
    assert "cutlass-fp8" not in str(raised.value).split("--kernels")[1]


def test_progress_and_reasons_go_to_stderr(no_gpu, monkeypatch, capsys):
    monkeypatch.setitem(peers.PREPARE, "machete-w4a16", refuse("no"))
    measure.measure(MODEL, TOKENS, KERNELS, quiet=False)
    stdout, stderr = capsys.readouterr()
    count = 4 * len(TOKENS) * len(KERNELS)
    assert not stdout and f"measure: {count} of {count}" in stderr
    assert "left out: machete-w4a16, N=6144 K=4096: RuntimeError: no\n" in stderr


# Timing and peers


@pytest.mark.parametrize(
    "calls, eager, replay, expected",
    [(24, 1e-3, 1e-4, (24, 20)), (2, 1e-4, 1e-3, (12, 20)), (5, 1e-4, 0.03, (15, 5)),
     (2, 0.01, 0.2, (2, 3))],
)  # fmt: skip
def test_a_graph_holds_several_calls_and_long_ones_are_replayed_less(
    monkeypatch, calls, eager, replay, expected
):
    made, counts = [], []

    def intervals(launch, count):
        counts.append(count)
        return [eager if len(counts) == 1 else replay] * count

    for name in ("CUDAGraph", "Stream", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    for name in ("graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(timing, "intervals", intervals)
    seconds = timing.seconds([lambda i=i: made.append(i) for i in range(calls)])
    held, replays = expected
    assert made == [0, *(list(range(calls)) * (held // calls))]
    assert counts[-1] == replays and seconds == pytest.approx(replay / held)


def test_copies_are_more_than_any_l2_holds():
    assert list(peers.PREPARE) == list(KERNELS)
    assert [peers.copies(size) for size in (4e6, 8e6, 30e6, 59e6, 1e9)] == [24, 24, 10, 6, 2]


@pytest.mark.parametrize("n, k", SHAPES[MODEL])
def test_calls_have_the_shapes_and_arguments_that_the_kernels_take(monkeypatch, n, k):
    """Under fake tensors and against the signatures of the vLLM that is installed."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils

    def unchanged(weight, *_):
        return weight

    made = ("cutlass_scaled_mm", "marlin_gemm", "machete_mm", "cutlass_w4a8_mm")
    for name in made:
        monkeypatch.setattr(_custom_ops, name, mock.create_autospec(getattr(_custom_ops, name)))
    for name in (
        "machete_prepack_B",
        "cutlass_encode_and_reorder_int4b",
        "cutlass_pack_scale_fp8",
    ):
        monkeypatch.setattr(_custom_ops, name, unchanged)
    monkeypatch.setattr(marlin_utils, "num_compute_units", lambda index: 132)
    monkeypatch.setattr(linear_ops, "workspace", lambda device: torch.zeros(1, dtype=torch.int32))
    with FakeTensorMode():
        for name in KERNELS:
            if name.startswith("humming"):
                continue
            prepared = peers.PREPARE[name](n, k)
            for m in (TIMED_TOKENS[0], TIMED_TOKENS[-1]):
                calls = prepared(m)
                assert 2 <= len(calls) <= 24
                y = calls[-1]()
                if name in OURS or name == "cublas-bf16":
                    assert y.shape == (m, n) and y.dtype == torch.bfloat16
    for name in made:
        assert getattr(_custom_ops, name).called, name


@pytest.mark.parametrize(
    ("capability", "codes", "is_wgmma"),
    [
        ((9, 0), ("sm_90", "sm_90a"), True),
        ((9, 0), ("sm_90",), False),
        ((8, 0), ("sm_80", "sm_90", "sm_90a"), False),
    ],
)
def test_the_floor_has_the_rate_of_the_path_that_runs(monkeypatch, capability, codes, is_wgmma):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(kernel_library, "built_for", lambda: codes)
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: None)
    monkeypatch.setattr(torch.ops.qoq, "mma_int8_operations", lambda out: 10**12, raising=False)
    monkeypatch.setattr(timing, "intervals", lambda launch, count: [1e-3, 2e-3, 9.0])
    found = int8_rate.int8_rate()
    assert found == roofline.WGMMA if is_wgmma else found.operations == 10**12 / 2e-3
