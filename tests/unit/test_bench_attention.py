"""`vllm-qoq bench attention` without a GPU: made-up results, refused peers, mistakes of users."""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from bench_units import bench_command, cells
from conftest import ROOT
from torch.overrides import TorchFunctionMode

from vllm_qoq import ops, plots
from vllm_qoq.bench import (
    BenchError,
    attention_kernels,
    attention_measure,
    attention_plot,
    attention_report,
    attention_result,
)
from vllm_qoq.bench.attention_cases import (
    DECODES,
    KERNELS,
    OURS,
    PEERS,
    Decode,
    Heads,
    blocks,
    cache_bytes,
    floor_seconds,
    pool_blocks,
    pool_bytes,
    token_bytes,
    turns,
)
from vllm_qoq.bench.result import LeftOut
from vllm_qoq.cli import bench as cli
from vllm_qoq.measuring import gpu as timing
from vllm_qoq.numerics import kv_layout
from vllm_qoq.ops import kv_ops

HEADS = Heads()
SMALL, LARGE = Decode(1, 8192), Decode(256, 4096)
WITHOUT_PROMPT = ("triton-int4", "turboquant-4bit")
PACKAGES = {"torch": "2.11.0", "vllm": "0.26.0"}


def seconds_of(case, kernel):
    """The k-th kernel takes k + 1 us for each 1000 tokens."""
    return 1e-9 * case.batch * case.context * (1 + KERNELS.index(kernel))


def made_up(kernels=KERNELS, cases=(SMALL, LARGE), heads=HEADS, without=()):
    """A result; `without` lists (kernel, case) that were left out, None for the write."""
    return attention_result.AttentionResult(
        heads=heads,
        device="Some GPU",
        environment={"packages": PACKAGES, "cuda": "13.0"},
        copy_rate=4e12,
        cases=tuple(cases),
        kernels=tuple(kernels),
        seconds={
            case: {name: seconds_of(case, name) for name in kernels if (name, case) not in without}
            for case in cases
        },
        write_seconds={
            name: 1e-6 * (2 + KERNELS.index(name))
            for name in kernels
            if (name, None) not in without
        },
        prefill_seconds={
            name: 1e-3 * (1 + KERNELS.index(name)) for name in kernels if name not in WITHOUT_PROMPT
        },
        left_out=tuple(LeftOut(name, str(case), "too odd") for name, case in without),
    )


@pytest.fixture
def run(monkeypatch, capfd):
    """run(ARGUMENTS): exit code, stdout and stderr of the command, on a made-up GPU."""
    monkeypatch.setattr(ops, "has_kernels", lambda device: True)

    def measure(heads, cases, kernels, quiet):
        return made_up(kernels, cases, heads)

    monkeypatch.setattr(attention_measure, "measure", measure)
    return bench_command("attention", monkeypatch, capfd)


# Bytes


def test_bytes_of_a_token_and_head():
    one = HEADS._replace(kv=1)
    assert [token_bytes(name, one) for name in KERNELS] == [136, 264, 200, 512, 256, 136, 134]
    for size in kv_layout.HEAD_SIZES:
        for name, bits in (("qoq-kv4", 4), ("qoq-kv8", 8), ("qoq-k8v4", "k8v4")):
            assert token_bytes(name, one._replace(size=size)) == kv_layout.slot_bytes(size, bits)


def test_floor_is_the_cache_at_the_rate_of_a_copy():
    assert cache_bytes("fa3-bf16", HEADS, LARGE) == 256 * 4096 * 8 * 512
    assert cache_bytes("qoq-kv4", HEADS, Decode(3, 100)) == 300 * 8 * 136
    assert floor_seconds("qoq-kv4", HEADS, LARGE, 4e12) == 256 * 4096 * 8 * 136 / 4e12


def test_small_cases_go_round_more_than_an_l2_holds_within_one_pool():
    assert turns("fa3-bf16", HEADS, LARGE) == 1
    for name in KERNELS:
        pool = pool_blocks(name, HEADS, DECODES)
        assert pool_bytes(name, HEADS, DECODES) < 4.4e9
        for case in DECODES:
            read = turns(name, HEADS, case) * cache_bytes(name, HEADS, case)
            assert read >= 1e9 and blocks(HEADS, case) * turns(name, HEADS, case) <= pool
    assert turns("qoq-kv4", HEADS, Decode(1, 1)) == 128
    assert pool_blocks("qoq-kv4", HEADS, [Decode(1, 65)]) == 2 * 128
    assert pool_blocks("qoq-kv4", HEADS._replace(block_tokens=16), [Decode(1, 1)]) == 8192 / 16


# Results


def test_report_has_all_tables_and_says_how_it_was_measured():
    text = attention_report.markdown(made_up())
    assert cells(text, "Microseconds", "qoq-kv4") == ["8.2", "1048.6"]
    assert cells(text, "Microseconds", "triton-int4") == ["49.2", "6291.5"]
    assert cells(text, "TB/s of the cache", "qoq-kv4") == ["1.09", "1.09"]
    assert cells(text, "TB/s of the cache", "fa3-bf16") == ["1.02", "1.02"]
    assert cells(text, "Share of the floor", "qoq-kv4") == ["27%", "27%"]
    assert cells(text, "Our kernels", "fa3-bf16 / qoq-kv4") == ["4.00", "4.00"]
    assert cells(text, "Our kernels", "fa3-fp8 / qoq-kv8") == ["2.50", "2.50"]
    assert cells(text, "Write of 256 tokens", "qoq-kv4 write") == ["2.0"]
    assert cells(text, "Prompt of 8192 tokens", "fa3-bf16 prompt") == ["4000"]
    for name in WITHOUT_PROMPT:
        assert cells(text, "Prompt of 8192 tokens", f"{name} prompt") == ["-"]
    assert "4.00 TB/s in\nthis run" in text and "vllm 0.26.0" in text
    assert "qoq-kv4 1088, qoq-kv8 2112, qoq-k8v4 1600, fa3-bf16 4096" in text
    assert "    vllm-qoq bench attention --cases 1x8192,256x4096\n" in text
    assert "Left out" not in text


def test_the_command_in_the_report_measures_the_same():
    heads = Heads(64, 8, 64, 16)
    found = made_up(("qoq-kv4", "fa3-fp8"), DECODES, heads)
    assert attention_report.command(found) == (
        "vllm-qoq bench attention --heads 64 --head-size 64 --block-size 16 "
        "--kernels qoq-kv4,fa3-fp8"
    )
    assert attention_report.command(made_up(cases=DECODES)) == "vllm-qoq bench attention"


def test_report_shows_what_was_left_out_as_a_dash_and_why():
    without = [("fa3-fp8", SMALL), ("fa3-fp8", LARGE), ("triton-int4", None)]
    text = attention_report.markdown(made_up(without=without))
    for heading in ("Microseconds", "TB/s", "Share of the floor"):
        assert cells(text, heading, "fa3-fp8") == ["-", "-"]
    assert cells(text, "Our kernels", "fa3-fp8 / qoq-kv4") == ["-", "-"]
    assert cells(text, "Write", "triton-int4 write") == ["-"]
    assert "- fa3-fp8, 1x8192; 256x4096: too odd\n" in text
    assert "Our kernels" not in attention_report.markdown(made_up(("fa3-fp8",)))


def test_json_has_every_number_and_null_for_what_is_missing():
    document = attention_result.to_json(made_up(without=[("fa3-bf16", SMALL)]))
    assert json.loads(json.dumps(document)) == document
    assert document["cache_bytes_per_token"]["qoq-kv4"] == 1088
    case = document["cases"][0]
    assert (case["batch"], case["context"]) == (1, 8192)
    assert case["microseconds"]["fa3-bf16"] is case["share_of_floor"]["fa3-bf16"] is None
    assert case["microseconds"]["qoq-kv4"] == pytest.approx(8.192)
    assert case["share_of_floor"]["qoq-kv4"] == pytest.approx(
        case["floor_microseconds"]["qoq-kv4"] / case["microseconds"]["qoq-kv4"]
    )
    assert document["write"]["microseconds"]["qoq-kv4"] == pytest.approx(2)
    assert document["prefill"]["microseconds"]["qoq-kv8"] == pytest.approx(2000)
    assert document["speed_against_peers"]["fa3-bf16 / qoq-kv4"] == [None, pytest.approx(4)]
    assert document["left_out"] == [{"kernel": "fa3-bf16", "where": "1x8192", "reason": "too odd"}]


@pytest.mark.parametrize("without", [(), [("qoq-kv4", SMALL), ("fa3-fp8", LARGE)]])
@pytest.mark.parametrize("kernels", [KERNELS, ("qoq-kv4",), ("triton-int4",)])
def test_plot_takes_what_was_measured(tmp_path, kernels, without):
    pytest.importorskip("matplotlib")
    attention_plot.save(made_up(kernels, without=without), tmp_path / "attention.png")
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("slower, said", [(1, "is 4.00x as fast as"), (6, "slower than")])
def test_the_title_of_the_plot_states_the_ratio_also_when_we_lose(slower, said):
    pytest.importorskip("matplotlib")
    found = made_up()
    for times in found.seconds.values():
        times["qoq-kv4"] *= slower
    drawn = attention_plot.figure(found, attention_plot.ratios(found))
    assert said in plots.title_of(drawn)


# The command


def test_output_has_three_files(run, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    code, stdout, _ = run("-o", out)
    assert code == 0 and stdout.endswith(f"wrote {out}\n")
    names = sorted(path.name for path in out.iterdir())
    assert names == ["attention.json", "attention.md", "attention.png"]
    assert (out / "attention.md").read_text() in stdout
    assert len(json.loads((out / "attention.json").read_text())["cases"]) == 8
    code, stdout, stderr = run("-o", out)
    assert (code, stdout) == (2, "") and f"{out}: exists already" in stderr


def test_options_reach_the_measurement_and_json_is_alone_on_stdout(run):
    options = "--cases 2x100,1x16 --heads 16 --kv-heads 2 --head-size 64 --block-size 32"
    code, stdout, _ = run("--json", "--kernels", "fa3-fp8,qoq-kv8", *options.split())
    document = json.loads(stdout)
    assert code == 0 and document["kernels"] == ["qoq-kv8", "fa3-fp8"]
    assert [(case["batch"], case["context"]) for case in document["cases"]] == [(2, 100), (1, 16)]
    names = ("heads", "kv_heads", "head_size", "block_size")
    assert [document[name] for name in names] == [16, 2, 64, 32]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--cases", "16"], "'16' is not a list of sequences x tokens"),
        (["--cases", "16x100x9"], "16x100x9 has 9 new tokens a sequence; take 8 or fewer"),
        (["--cases", "16x3x4"], "16x3x4 has 4 new tokens a sequence; take 3 or fewer"),
        (["--cases", "16x0"], "'16x0' is not a list"),
        (["--cases", "1x2x3x4"], "'1x2x3x4' is not a list"),
        (["--kernels", "qoq-kv4,fa3"], "'fa3' is not a kernel; choose from qoq-kv4"),
        (["--heads", "0"], "'0' is not a positive number"),
        (["--heads", "30"], "--heads 30 is not a multiple of --kv-heads 8"),
        (["--heads", "34", "--kv-heads", "2"], "17 query heads for a KV head"),
        (["--head-size", "80"], "serve heads of 64, 96, 128, 256, not --head-size 80"),
        (["--block-size", "24"], "--block-size 24 is not a multiple of 16"),
    ],
)
def test_bad_arguments_name_the_value(run, arguments, message):
    code, stdout, stderr = run(*arguments)
    assert (code, stdout) == (2, "") and message in stderr


def test_cases_keep_their_order():
    assert cli.decodes("64x1024,1x8192,64x1024") == (Decode(64, 1024), Decode(1, 8192))
    assert cli.decodes("64x1024x4,64x1024x1") == (Decode(64, 1024, 4), Decode(64, 1024))
    assert str(Decode(64, 1024, 4)) == "64x1024x4"


def test_peers_alone_need_no_kernels_of_ours(run, monkeypatch):
    monkeypatch.setattr(ops, "has_kernels", lambda device: False)
    assert run("--kernels", ",".join(PEERS), "--head-size", "96")[0] == 0
    code, _, stderr = run()
    assert code == 2 and "VLLM_QOQ_CUDA=1" in stderr and ",".join(PEERS) in stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_command_says_so():
    line = [sys.executable, "-m", "vllm_qoq.cli", "bench", "attention"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: torch finds no NVIDIA GPU"), done.stderr


def test_help_imports_no_torch():
    code = (
        "import sys\n"
        "from vllm_qoq.cli.main import main\n"
        "sys.argv = ['vllm-qoq', 'bench', 'attention', '--help']\n"
        "try: main()\n"
        "finally: assert not {'torch', 'vllm', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in KERNELS) and "32x32768" in done.stdout


# Measuring


@pytest.fixture
def no_gpu(monkeypatch):
    """Timing a call adds its (kernel, case) to what this returns.

    The case of a write is None, that of a prompt 0.
    """
    timed = []

    def preparation(name):
        def calls(case):
            def call():
                return torch.zeros(1)

            call.what = name, case
            return [call]

        prefill = None if name in WITHOUT_PROMPT else lambda: calls(0)
        return lambda heads, blocks: attention_kernels.Kernel(calls, lambda: calls(None), prefill)

    def seconds(calls):
        timed.append(calls[0].what)
        name, case = calls[0].what
        if case == 0:
            return 1e-3 * (1 + KERNELS.index(name))
        return 1e-6 * (2 + KERNELS.index(name)) if case is None else seconds_of(case, name)

    monkeypatch.setattr(attention_kernels, "PREPARE", {name: preparation(name) for name in KERNELS})
    monkeypatch.setattr(timing, "seconds", seconds)
    monkeypatch.setattr(timing, "copy_rate", lambda: 4e12)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**11, 10**11))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    return timed


def measure(kernels=KERNELS, quiet=True):
    return attention_measure.measure(HEADS, (SMALL, LARGE), kernels, quiet)


def refuse(message, error=RuntimeError):
    def work(*_):
        raise error(message)

    return work


def test_the_kernels_of_a_case_are_measured_together_in_changing_order(no_gpu):
    found = measure()
    assert found.seconds == made_up().seconds and not found.left_out
    assert found.write_seconds == made_up().write_seconds
    assert found.prefill_seconds == made_up().prefill_seconds
    calls = [call for call in no_gpu if call[1] != 0]
    groups = [calls[i : i + len(KERNELS)] for i in range(0, len(calls), len(KERNELS))]
    assert [{case for _, case in group} for group in groups] == [{SMALL}, {LARGE}, {None}]
    assert all(sorted(name for name, _ in group) == sorted(KERNELS) for group in groups)
    assert len({tuple(name for name, _ in group) for group in groups}) == 3


def test_a_failing_peer_is_reported_and_the_others_are_measured(no_gpu, monkeypatch, capsys):
    prepare = attention_kernels.PREPARE
    monkeypatch.setitem(prepare, "fa3-bf16", refuse("no extension", ImportError))
    good = prepare["fa3-fp8"](HEADS, 1)

    def decode(case):
        return refuse("too long\nand so on")() if case == LARGE else good.decode(case)

    fp8 = attention_kernels.Kernel(decode, good.write, None)
    monkeypatch.setitem(prepare, "fa3-fp8", lambda heads, blocks: fp8)
    nan = attention_kernels.Kernel(lambda _: [lambda: torch.tensor(torch.nan)], good.write, None)
    monkeypatch.setitem(prepare, "triton-int4", lambda heads, blocks: nan)
    found = measure(quiet=False)
    text = attention_report.markdown(found)
    assert cells(text, "Microseconds", "fa3-bf16") == ["-", "-"]
    assert cells(text, "Microseconds", "fa3-fp8") == ["41.0", "-"]
    assert cells(text, "Microseconds", "triton-int4") == ["-", "-"]
    assert cells(text, "Microseconds", "qoq-kv8") == ["16.4", "2097.2"]
    assert "- fa3-bf16, everywhere: ImportError: no extension\n" in text
    assert "- fa3-fp8, 256x4096: RuntimeError: too long\n" in text
    assert "- triton-int4, 1x8192; 256x4096: ArithmeticError: the output has" in text
    stdout, stderr = capsys.readouterr()
    assert not stdout and "measure: 28 of 28" in stderr
    assert stderr.count("left out: triton-int4") == stderr.count("left out: fa3-bf16") == 1


def test_a_failure_of_our_own_kernel_is_raised(no_gpu, monkeypatch):
    monkeypatch.setitem(attention_kernels.PREPARE, "qoq-kv4", refuse("illegal instruction"))
    with pytest.raises(RuntimeError, match="illegal instruction"):
        measure()


def test_a_peer_that_breaks_the_gpu_ends_the_run_with_the_remedy(no_gpu, monkeypatch):
    broken = refuse("an illegal memory access")
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setitem(attention_kernels.PREPARE, "fa3-fp8", broken)
    others = "qoq-kv4,qoq-kv8,qoq-k8v4,fa3-bf16,triton-int4,turboquant-4bit"
    with pytest.raises(BenchError, match=f"--kernels {others}$"):
        measure()


def test_too_little_memory_is_said_before_work_begins(no_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**11))
    with pytest.raises(BenchError, match=r"need 17\.7 GB, but 1\.0 GB .* fewer or smaller --cases"):
        measure()


# Kernels


class OnCPU(TorchFunctionMode):
    """Makes tensors for the GPU on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@pytest.fixture
def vllm_calls(monkeypatch):
    """The peers' functions, which only check the signatures of the vLLM that is installed."""
    from vllm import _custom_ops
    from vllm.v1.attention.ops import (
        triton_reshape_and_cache_flash,
        triton_turboquant_decode,
        triton_turboquant_store,
        triton_unified_attention,
    )

    monkeypatch.setattr(kv_ops, "workspace", lambda *_: torch.zeros(1, dtype=torch.int32))
    path = Path(_custom_ops.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    spec = importlib.util.spec_from_file_location("interface", path)
    interface = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(interface)  # the package refuses to be imported without a GPU
    fa3 = types.ModuleType("vllm.vllm_flash_attn")
    for name in ("flash_attn_varlen_func", "get_scheduler_metadata"):
        setattr(fa3, name, mock.create_autospec(getattr(interface, name)))
    fa3.is_fa_version_supported = lambda version: version == 3
    fa3.fa_version_unsupported_reason = None
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", fa3)
    made = [fa3.flash_attn_varlen_func, fa3.get_scheduler_metadata]
    per_token_head = "triton_reshape_and_cache_flash_per_token_head_quant"
    for module, name in (
        (_custom_ops, "reshape_and_cache_flash"),
        (triton_reshape_and_cache_flash, per_token_head),
        (triton_unified_attention, "unified_attention"),
        (triton_turboquant_store, "triton_turboquant_store"),
        (triton_turboquant_decode, "triton_turboquant_decode_attention"),
        (kv_ops, "kv_decode"),
        (kv_ops, "kv_write"),
    ):
        monkeypatch.setattr(module, name, mock.create_autospec(getattr(module, name)))
        made.append(getattr(module, name))
    names = ("fa3", "metadata", "fa3 write", "int4 write", "int4")
    names += ("turboquant write", "turboquant", "decode", "write")
    return dict(zip(names, made, strict=True))


def prepared(name, heads, case):
    """A kernel and the calls of a case."""
    kernel = attention_kernels.PREPARE[name](heads, pool_blocks(name, heads, [case]))
    calls = kernel.decode(case)
    assert len(calls) == turns(name, heads, case)
    return kernel, calls


@pytest.fixture
def small(monkeypatch):
    """Heads and a case for this machine, with a pool of some calls."""
    monkeypatch.setattr("vllm_qoq.bench.attention_cases._ROUND_BYTES", 1e6)
    return Heads(8, 2, 64, 32), Decode(3, 100)


@pytest.mark.parametrize("name", KERNELS)
def test_calls_have_the_shapes_that_the_kernels_take(vllm_calls, small, name):
    heads, case = small
    with OnCPU():
        kernel, calls = prepared(name, heads, case)
        out = calls[-1]()
        assert out.shape == (3, 8, 64) and out.dtype == torch.bfloat16 and out.isnan().all()
        assert kernel.write()[-1]().shape == (256, 2, 64)
    assert (kernel.prefill is None) == (name in WITHOUT_PROMPT)
    functions = {"qoq": "decode", "fa3": "fa3", "triton": "int4", "turboquant": "turboquant"}
    function = vllm_calls[functions[name.split("-")[0]]]
    given = function.call_args
    table = given.args[2] if name in OURS else given.kwargs["block_table"]
    assert table.shape == (3, 4) and table.dtype == torch.int32 and table.unique().numel() == 12


@pytest.mark.parametrize("name", KERNELS)
def test_several_new_tokens_are_rows_of_the_query(vllm_calls, small, name):
    heads, case = small[0], small[1]._replace(query_len=4)
    with OnCPU():
        if name not in OURS and not name.startswith("fa3"):
            with pytest.raises(ValueError, match="one new token a sequence, not for 4"):
                prepared(name, heads, case)
            return
        out = prepared(name, heads, case)[1][-1]()
    assert out.shape == (12, 8, 64)
    if name in OURS:
        *_, query_len, starts = vllm_calls["decode"].call_args.args
        assert query_len == 4 and starts.tolist() == [0, 4, 8, 12]
    else:
        given = vllm_calls["fa3"].call_args.kwargs
        assert given["max_seqlen_q"] == 4 and given["cu_seqlens_q"].tolist() == [0, 4, 8, 12]


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in WITHOUT_PROMPT])
def test_a_prompt_is_written_and_attends_to_all_of_it(vllm_calls, small, name, monkeypatch):
    monkeypatch.setattr(attention_kernels, "PREFILL_TOKENS", 100)
    heads, case = small
    with OnCPU():
        out = prepared(name, heads, case)[0].prefill()[-1]()
    assert out.shape == (100, 8, 64) and out.is_contiguous() and out.isnan().all()
    given = vllm_calls["fa3"].call_args.kwargs
    assert given["out"] is out and given["cu_seqlens_q"].tolist() == [0, 100] and given["causal"]
    assert given["max_seqlen_q"] == given["max_seqlen_k"] == 100
    written = vllm_calls["write" if name in OURS else "fa3 write"].call_args.args
    slots = written[2] if name in OURS else written[4]
    assert written[0].shape == written[1].shape == (100, 2, 64) and slots.unique().numel() == 100
    if name in OURS:
        assert given["cu_seqlens_k"].tolist() == [0, 100] and given["k"] is written[0]
    else:
        table = given["block_table"]
        assert torch.equal(slots // 32, table[0].long().repeat_interleave(32)[:100])
        assert torch.equal(slots % 32, torch.arange(128)[:100] % 32)


@pytest.mark.parametrize("name", KERNELS)
def test_the_tables_of_a_case_share_no_block(vllm_calls, small, name):
    heads, case = small
    pool = pool_blocks(name, heads, [case])
    with OnCPU():
        tables = attention_kernels._tables(heads, case, pool, name)
        used = torch.stack(tables).flatten()
    assert len(tables) == turns(name, heads, case) > 1
    assert used.unique().numel() == used.numel() and used.min() >= 0 and used.max() < pool


@pytest.mark.parametrize("name", OURS)
def test_our_pages_hold_numbers_of_about_one(vllm_calls, small, name):
    heads, case = small
    with OnCPU():
        prepared(name, heads, case)[1][0]()
    _, pages, table, lengths, _, bits, *_ = vllm_calls["decode"].call_args.args
    assert lengths.tolist() == [100] * 3 and kv_layout.block_tokens(pages, 64, bits) == 32
    for part in kv_layout.read(pages, table[0], 100, 64, bits):
        assert part.isfinite().all() and 0.5 < part.abs().mean() < 2


def test_the_title_of_a_plot_of_mixed_widths_has_their_name():
    pytest.importorskip("matplotlib")
    found = made_up(("qoq-k8v4", "fa3-fp8"))
    drawn = attention_plot.figure(found, attention_plot.ratios(found))
    assert plots.title_of(drawn).startswith("Attention over our k8v4 KV cache is")


def test_fp8_of_random_bytes_is_finite_and_k_and_v_are_apart(vllm_calls, small):
    heads, case = small
    with OnCPU():
        prepared("fa3-fp8", heads, case)[1][0]()
    given = vllm_calls["fa3"].call_args.kwargs
    key, value = given["k"], given["v"]
    assert given["q"].dtype == key.dtype == torch.float8_e4m3fn
    assert key.float().isfinite().all() and value.float().abs().max() < 2
    assert key.shape == value.shape and key.shape[1:] == (32, 2, 64)
    assert value.data_ptr() - key.data_ptr() == 64 and key.stride() == (32 * 256, 256, 128, 1)
    assert given["k_descale"].shape == (3, 2)
    assert vllm_calls["metadata"].call_args.kwargs["qkv_dtype"] == torch.float8_e4m3fn


def test_int4_scales_lie_behind_their_codes(vllm_calls, small):
    heads, case = small
    with OnCPU():
        prepared("triton-int4", heads, case)[1][0]()
    given = vllm_calls["int4"].call_args.kwargs
    for part, scale in (("k", "k_scale_cache"), ("v", "v_scale_cache")):
        assert given[scale].data_ptr() == given[part].data_ptr() + 32
        assert given[scale].shape == given[part].shape[:3]
        assert [4 * step for step in given[scale].stride()] == list(given[part].stride()[:3])
        assert given[scale].min() >= 0.02 and given[scale].max() <= 0.06
    assert given["v"].data_ptr() == given["k"].data_ptr() + 36


def test_turboquant_fills_its_cache_with_its_own_write(vllm_calls, small, monkeypatch):
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    monkeypatch.setattr(attention_kernels, "_FILL_TOKENS", 1000)
    heads, case = small
    with OnCPU():
        calls = prepared("turboquant-4bit", heads, case)[1]
        out = calls[0]()
    given = vllm_calls["turboquant"].call_args.kwargs
    expected = TurboQuantConfig.from_cache_dtype("turboquant_4bit_nc", 64)
    cache, rotation = given["kv_cache"], given["PiT"]
    pool = pool_blocks("turboquant-4bit", heads, [case])
    assert cache.shape == (pool, 32, 2, expected.slot_size_aligned)
    assert 2 * expected.slot_size_aligned == token_bytes("turboquant-4bit", heads)
    assert torch.allclose(rotation @ rotation.T, torch.eye(64), atol=1e-6)
    assert torch.equal(rotation, rotation.T) and given["Pi"] is rotation
    assert given["norm_correction"] and not given["key_fp8"] and given["centroids"].shape == (16,)
    # vLLM takes buffers of these shapes and types, and otherwise allocates its own.
    assert given["mid_o_buf"].shape == (3, 8, given["max_num_kv_splits"], 65)
    assert given["output_buf"] is out and given["lse_buf"].shape == (3, 8)
    places = []
    for call in vllm_calls["turboquant write"].call_args_list:
        key, value, written, slots = call.args
        assert written is cache and key.shape == value.shape == (len(slots), 2, 64)
        assert torch.equal(call.kwargs["PiT"], rotation)
        middle = call.kwargs["midpoints"]
        assert (given["centroids"][:-1] < middle).all() and (middle < given["centroids"][1:]).all()
        places.append(slots)
    assert len(places) > 1 and torch.equal(torch.cat(places), torch.arange(32 * pool))
