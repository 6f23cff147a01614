"""What is settled in the process that starts an engine: refusals, statistics, who sees metrics.

Through vLLM's own making of an engine's configuration, which is all that happens there.
"""

import asyncio
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lora_adapters import write_adapter, write_transforms
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories

import vllm_qoq
from vllm_qoq import kernel_library, ops
from vllm_qoq.checkpoint import hub, transforms
from vllm_qoq.cli.main import main
from vllm_qoq.errors import EngineError, UserError
from vllm_qoq.numerics.rotation import signs
from vllm_qoq.quantizer.rotate import hadamard
from vllm_qoq.routing.table import RoutingError
from vllm_qoq.serving.options import Options
from vllm_qoq.serving.plugin import front_end
from vllm_qoq.serving.plugin.metrics import RoutingStatLogger
from vllm_qoq.serving.routing.policy import routing_in_force
from vllm_qoq.serving.signals import queue

LOAD = {
    "prefill": "w8a8",
    "decode": "w8a8",
    "load": {"enter": 3, "leave": 0, "prefill": "w4a8", "decode": "w4a8"},
}


def configure(checkpoint, qoq=None, arguments=AsyncEngineArgs, **options):
    """What `vllm serve` (or `LLM`, with `EngineArgs`) does before it starts an engine."""
    count = options.pop("api_process_count", 1)
    additional = {"qoq": qoq} if qoq is not None else options.pop("additional_config", {})
    made = arguments(
        str(checkpoint),
        max_model_len=512,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        additional_config=additional,
        **options,
    )
    made._api_process_count = count
    made._api_process_rank = -1 if count > 1 else 0
    return made.create_engine_config()


@pytest.fixture(autouse=True)
def no_writer(monkeypatch):
    """As in a process that has not loaded the stat logger."""
    monkeypatch.setattr(queue, "_is_writer_here", False)


@pytest.mark.parametrize(
    ("qoq", "options", "message"),
    [
        ({"kv_bitz": 4}, {}, "qoq: there is no option 'kv_bitz'; did you mean 'kv_bits'"),
        ({"kv_bits": 5}, {}, "qoq.kv_bits: Input should be 4, 8, 16 or 'k8v4', but it is 5"),
        ({"force_set": "w4"}, {}, "force_set is 'w4', but the checkpoint has w8a8, w4a8"),
        ({"routing": "w8a8"}, {}, "qoq.routing: .*but it is 'w8a8'"),
        ({"routing": {"prefill": "w8a8"}}, {}, "routing.decode"),
        ({"force_load": "busy"}, {}, "the routing has no 'load'"),
        ({"trace": "/nowhere/steps.jsonl"}, {}, "qoq.trace is '/nowhere/steps.jsonl'"),
        (None, {"additional_config": {"kv_bits": 4}}, "'kv_bits' would be ignored"),
        (None, {"additional_config": {"QoQ": {}}}, "'QoQ' would be ignored"),
        ({"lora": "converted"}, {}, "qoq.lora says what adapters are.*add --enable-lora"),
        ({"lora": "yes"}, {"enable_lora": True}, "qoq.lora: .*'converted'"),
        ({"kv_bits": 4}, {"block_size": 8}, "--block-size 8"),
        ({"kv_bits": 4}, {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"routing": LOAD}, {"api_process_count": 2}, "2 API processes.*--api-server-count 1"),
        ({"routing": LOAD}, {"arguments": EngineArgs}, r"only the Python front end.*LLM\(\)"),
    ],
)
def test_what_cannot_be_served_is_refused_before_an_engine_starts(
    nested_dir, qoq, options, message
):
    with pytest.raises(EngineError, match=message) as refusal:
        configure(nested_dir, qoq, **options)
    # pydantic would add lines of its own to any ValueError.
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("qoq", "message"),
    [
        ({}, "can only quantize its KV cache.*leave out --quantization"),
        ({"kv_bits": 4, "force_set": "w8a8"}, "qoq.force_set: this model has no sets"),
    ],
)
def test_so_is_what_a_model_without_sets_cannot_do(tiny_model, qoq, message):
    with pytest.raises(EngineError, match=message):
        configure(tiny_model, qoq, quantization="qoq")


def test_adapters_are_refused_where_the_weights_are_in_another_basis(
    nested_dir, merged_dir, tmp_path
):
    """Unless the user says that they are in it."""

    def refusal(checkpoint):
        with pytest.raises(EngineError, match=r"--enable-lora: .*convert-lora ADAPTER ") as found:
            configure(checkpoint, enable_lora=True)
        assert """'{"qoq": {"lora": "converted"}}'""" in str(found.value)
        configure(checkpoint, {"lora": "converted"}, enable_lora=True)
        return str(found.value)

    configure(nested_dir, enable_lora=True)
    assert "norms of the sets differ" in refusal(merged_dir)
    changed = Path(shutil.copytree(nested_dir, tmp_path / "changed"))
    write_transforms(changed, {transforms.VALUE_ROTATION: signs(hadamard(64))})
    assert "its weights were transformed (qoq_transforms.safetensors)" in refusal(changed)
    tensors = load_file(changed / transforms.FILE)
    of_others = transforms.encoded(
        {transforms.VALUE_ROTATION: tensors["transforms.value_rotation"]}, torch.zeros(32).byte()
    )
    (changed / transforms.FILE).write_bytes(of_others)
    with pytest.raises(EngineError, match="is of other weights than those beside it"):
        configure(changed, {"lora": "converted"}, enable_lora=True)
    (changed / transforms.FILE).unlink()
    (changed / transforms.REPORT).write_text(json.dumps({"options": {"reorder": True}}))
    assert "(quantization_report.json: reorder)" in refusal(changed)
    config = json.loads((changed / "config.json").read_text())
    config["quantization_config"]["stream"] = {"rotation": "stored"}
    (changed / "config.json").write_text(json.dumps(config))
    assert "the residual stream of this checkpoint is rotated" in refusal(changed)
    int8 = json.loads((nested_dir / "config.json").read_text())
    int8["quantization_config"]["lm_head"] = {"bits": 8}
    (changed / transforms.REPORT).unlink()
    (changed / "config.json").write_text(json.dumps(int8))
    with pytest.raises(EngineError, match="the lm_head of this checkpoint is int8"):
        configure(changed, enable_lora=True)
    configure(changed, enable_lora=True, lora_target_modules=["q_proj"])
    mixture = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    (changed / "config.json").write_text(json.dumps(config | mixture))
    with pytest.raises(EngineError, match=r"Qwen3MoeForCausalLM: LoRA .*mixtures of experts"):
        configure(changed, {"lora": "converted"}, enable_lora=True)


def serve_arguments(checkpoint, adapter, qoq=None):
    """The arguments of `vllm serve`, by its own parser."""
    given = [str(checkpoint), "--enable-lora", "--max-model-len=512", "--enforce-eager"]
    given += [f"--kv-cache-memory-bytes={64 << 20}", "--lora-modules", f"mine={adapter}"]
    given += [f"--additional-config={json.dumps({'qoq': qoq})}"] if qoq is not None else []
    found = make_arg_parser(FlexibleArgumentParser()).parse_args(given)
    found.model = found.model_tag
    return found


def test_a_server_starts_with_adapters_in_the_basis_of_its_checkpoint(
    nested_dir, tiny_model, tmp_path, monkeypatch
):
    turned = []
    for name in ("one", "other"):
        folder = Path(shutil.copytree(nested_dir, tmp_path / name))
        scales = {f"model.layers.{i}.key_scale": torch.rand(2, 64) + 1 for i in range(2)}
        write_transforms(folder, scales)
        turned.append(folder)
    trained = write_adapter(tiny_model, tmp_path / "trained", seed=0)
    converted = vllm_qoq.convert_lora(trained, turned[0], tmp_path / "converted").output

    def accept(*arguments):
        args = serve_arguments(*arguments)  # where vLLM's functions have them, too
        AsyncEngineArgs.from_cli_args(args).create_engine_config()

    def refusal(*arguments):
        async def start():
            async with build_async_engine_client(serve_arguments(*arguments)):
                pass

        with pytest.raises(EngineError, match=r"^LoRA adapter mine=") as found:
            asyncio.run(start())
        return str(found.value)

    both = {"lora": "converted"}, {"lora": "trained"}
    accept(nested_dir, trained)
    for qoq in both:
        accept(turned[0], converted, qoq)
    accept(turned[0], trained, both[1])
    accept(turned[0], tmp_path / "nowhere", both[0])  # vLLM says that nothing is there
    found = refusal(turned[0], trained, both[0])
    assert f"convert-lora {trained} {turned[0]} -o CONVERTED" in found
    assert """'{"qoq": {"lora": "trained"}}'""" in found
    for qoq in both:
        found = refusal(turned[1], converted, qoq)
        assert "was converted for 'one'" in found and f"ADAPTER {turned[1]} -o" in found
    assert "serve the adapter as it was trained" in refusal(nested_dir, converted)
    (converted / "adapter_config.json").write_text("{")
    assert "adapter_config.json: is not JSON" in refusal(turned[0], converted, both[0])
    monkeypatch.setattr(hub, "one_file", lambda *_: trained / "adapter_config.json")
    assert "mine=org/adapter: was not converted" in refusal(turned[0], "org/adapter", both[0])


def test_hidden_states_that_cannot_be_turned_are_refused(nested_dir, tiny_model, tmp_path):
    changed = Path(shutil.copytree(nested_dir, tmp_path / "changed"))
    config = json.loads((changed / "config.json").read_text())

    def refusal(rotation, **options):
        config["quantization_config"]["stream"] = {"rotation": rotation}
        (changed / "config.json").write_text(json.dumps(config))
        with pytest.raises(EngineError, match="the hidden states of this checkpoint are rot") as it:
            configure(changed, **options)
        return str(it.value)

    head = {"method": "eagle", "model": str(tiny_model), "num_speculative_tokens": 2}
    assert "method 'eagle' needs" in refusal("unknown", speculative_config=head)
    assert "--enable-prompt-embeds needs" in refusal("stored", enable_prompt_embeds=True)
    staged = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    assert "in 2 pipeline stages" in refusal("stored", speculative_config=head, **staged)
    configure(changed, speculative_config=head)


@pytest.fixture
def with_means(tiny_model, tmp_path):
    """`with_means(KV_CACHE, LAYERS)`: a copy that announces KV_CACHE and has means of LAYERS."""

    def make(kv_cache, layers):
        folder = Path(shutil.copytree(tiny_model, tmp_path / "means"))
        tensors = load_file(folder / "model.safetensors")
        tensors |= {MEAN.format(layer): torch.zeros(2, 64) for layer in layers}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        if kv_cache is not None:
            config["quantization_config"] = {"quant_method": "qoq", "kv_cache": kv_cache}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


MEAN = "model.layers.{}.self_attn.k_mean"


@pytest.mark.parametrize("kv_cache", [None, {"bits": 4}, {"bits": 16}])
def test_a_mean_that_is_not_announced_is_refused_with_its_file(with_means, kv_cache):
    folder, qoq = with_means(kv_cache, [1]), {"kv_bits": 4} if kv_cache is None else None
    message = r'model\.safetensors: .*layers\.1.*k_mean: is not announced.*write "k_mean": true'
    with pytest.raises(EngineError, match=message):
        configure(folder, qoq, quantization="qoq")


def test_a_mean_that_is_announced_and_missing_is_refused_where_it_would_be_used(with_means):
    folder = with_means({"bits": 4, "k_mean": True}, [0])
    with pytest.raises(EngineError, match=r"layers\.1\.self_attn\.k_mean: .*but it is missing"):
        configure(folder)
    configure(folder, load_format="dummy")
    configure(folder, {"kv_bits": 16})


def test_means_as_announced_are_served(with_means):
    configure(with_means({"bits": 4, "k_mean": True}, [0, 1]))


def test_a_command_says_it_in_one_line(nested_dir, heldout_text, monkeypatch, capfd):
    def refuse(config, vllm_config):
        raise UserError("what is refused")

    monkeypatch.setattr(front_end, "check", refuse)
    command = ["vllm-qoq", "perplexity", str(nested_dir), "--text", str(heldout_text)]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "what is refused" in last


def test_a_broken_section_is_one_line_too(nested_dir, tmp_path):
    shutil.copytree(nested_dir, tmp_path / "broken")
    file = tmp_path / "broken" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["routing"]["prefill"] = "w9"
    file.write_text(json.dumps(config))
    with pytest.raises(EngineError, match=r"routing.prefill names the set 'w9'.*w8a8") as refusal:
        configure(tmp_path / "broken")
    assert len(str(refusal.value).splitlines()) == 1


def on_gpu(monkeypatch, capability, codes, lacking=()):
    """As on a machine with a GPU, with a library built for `codes`, `lacking` some ops."""
    platform = SimpleNamespace(
        get_device_capability=lambda: capability, get_device_name=lambda: "Some GPU"
    )
    monkeypatch.setattr(front_end, "current_platform", platform)
    monkeypatch.setattr(ops, "missing_ops", lambda device_type: lacking)
    monkeypatch.setattr(kernel_library, "built_for", lambda: codes)


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        (("sm_90", "sm_90a"), ["w4a8_gemm by the hopper path, all others from sm_90"]),
        (("compute_80",), ["w4a8_gemm by the portable path, all others from compute_80"]),
        (("sm_80",), []),
        (None, []),
    ],
)
def test_the_log_says_once_which_kernels_run(monkeypatch, codes, said):
    on_gpu(monkeypatch, (9, 0), codes)
    lines = []
    monkeypatch.setattr(front_end.logger, "info", lambda text, *values: lines.append(text % values))
    front_end._say_kernels()
    assert lines == [f"Kernels of vllm-qoq on Some GPU (9.0): {line}" for line in said]


@pytest.mark.parametrize(
    ("capability", "codes", "message"),
    [
        ((9, 0), None, "this build of vllm-qoq has no CUDA kernels"),
        (None, None, "this build of vllm-qoq has no CUDA kernels"),
        ((7, 5), ("sm_90",), r"Hopper.*Some GPU has compute capability 7\.5"),
        ((8, 0), ("sm_90",), r"built for sm_90; Some GPU .* 8\.0; .*VLLM_QOQ_CUDA_ARCHS=8\.0 "),
    ],
)
def test_a_gpu_without_our_kernels_is_refused_by_set(
    nested_dir, monkeypatch, capability, codes, message
):
    section = configure(nested_dir).quant_config.section
    on_gpu(monkeypatch, capability, codes)
    routing = routing_in_force(section, Options())
    with pytest.raises(RoutingError, match=message):
        front_end._check_kernels(section, routing, "cuda")
    front_end._check_kernels(section, routing, "cpu")


@pytest.mark.parametrize("capability", [(9, 0), None])
def test_a_library_of_another_version_is_refused_by_set(nested_dir, monkeypatch, capability):
    section = configure(nested_dir).quant_config.section
    on_gpu(monkeypatch, capability, ("sm_90", "sm_90a"), ["qoq::new_op"])
    with pytest.raises(RoutingError, match="another version of vllm-qoq: it lacks qoq::new_op"):
        front_end._check_kernels(section, routing_in_force(section, Options()), "cuda")


# Statistics


def offered():
    """The stat loggers that vLLM finds, as its asynchronous front end looks for them."""
    return load_stat_logger_plugin_factories()


@pytest.mark.parametrize(
    ("qoq", "options", "is_offered"),
    [
        ({}, {}, True),
        ({}, {"disable_log_stats": True}, False),
        # It cannot be followed without statistics, and was asked for.
        ({"routing": LOAD}, {"disable_log_stats": True}, True),
        ({}, {"api_process_count": 2}, False),
    ],
)
def test_a_model_of_ours_has_the_stat_logger_once(nested_dir, qoq, options, is_offered):
    configure(nested_dir, qoq, **options)
    assert offered() == ([RoutingStatLogger] if is_offered else [])
    assert offered() == [], "the engine that comes next may be another model's"


def test_another_model_has_none_so_its_statistics_are_as_it_says(tiny_model):
    configure(tiny_model, {"kv_bits": 4})
    assert offered() == []


def test_several_api_processes_are_told_that_metrics_have_nothing_of_ours(
    nested_dir, monkeypatch, vllm_log
):
    def warnings():
        return sum("/metrics has no vllm:qoq_*" in line for line in vllm_log)

    configure(nested_dir)
    assert warnings() == 0
    configure(nested_dir, api_process_count=2)
    assert warnings() == 1
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/tmp")
    configure(nested_dir)
    assert offered() == [] and warnings() == 2
