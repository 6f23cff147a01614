"""What `bench serving --online` runs is understood by vLLM's own parsers."""

from pathlib import Path

from vllm.benchmarks import serve
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_qoq.bench.serving.cases import Lengths
from vllm_qoq.bench.serving.online import client, server
from vllm_qoq.bench.serving.online.load import Load


def test_the_client_understands_its_options():
    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    load = Load(Lengths(1024, 512), objective={"ttft": 500.0, "tpot": 12.5, "e2el": 9000.0})
    command = client.arguments("http://127.0.0.1:1", "folder", load, 0.5, Path("out/x.result"))
    assert command[: len(server.VLLM) + 2] == [*server.VLLM, "bench", "serve"]
    found = parser.parse_args(command[len(server.VLLM) + 2 :])
    assert (found.request_rate, found.burstiness, found.num_prompts) == (0.5, 1.0, 30)
    assert (found.random_input_len, found.random_output_len) == (1024, 512)
    assert serve.check_goodput_args(found) == dict(load.objective)
    assert serve.compute_result_filename(found, "model", None, "now") == "out/x.result"
    assert found.ignore_eos and found.save_result and not found.save_detailed


def test_the_server_understands_arguments_of_engines():
    arguments = {
        "max_model_len": 2560,
        "gpu_memory_utilization": 0.9,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "load_format": "dummy",
        "generation_config": "vllm",
        "kv_cache_dtype": "fp8",
        "quantization": "qoq",
        "additional_config": {"qoq": {"kv_bits": 4}},
        "compilation_config": {"cudagraph_capture_sizes": [1, 2]},
        "served_model_name": ["a", "b"],
        "seed": None,
    }
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    found = parser.parse_args(server.flags(arguments))
    assert (found.max_model_len, found.quantization, found.seed) == (2560, "qoq", 0)
    assert found.enable_prefix_caching is False and found.enforce_eager is True
    assert found.additional_config == {"qoq": {"kv_bits": 4}}
    assert found.gpu_memory_utilization == 0.9 and found.served_model_name == ["a", "b"]
    capture_sizes = getattr(found.compilation_config, "cudagraph_capture_sizes", None)
    assert capture_sizes == [1, 2]
