"""The engine of `vllm-qoq bench serving`, really: what it measures, and that it goes on."""

import json
import sys

import pytest
import torch
import transformers
from moe_models import FAMILIES, SIZES
from plugin_units import tensor_parallel, vllm_config
from vllm.model_executor.layers import vocab_parallel_embedding
from warm_process import run as run_warm

from vllm_qoq.bench.serving import run
from vllm_qoq.bench.serving.cases import Lengths
from vllm_qoq.bench.serving.job import Job, check_job
from vllm_qoq.bench.serving.random_weights import RandomWeights
from vllm_qoq.bench.serving.records import read
from vllm_qoq.bench.serving.shapes import SHAPES
from vllm_qoq.bench.serving.work import opened
from vllm_qoq.environment import describe

LENGTHS = Lengths(32, 8)
MIXTURE = {
    **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16"},
    **{**SIZES, **FAMILIES["Qwen3Moe"], "moe_intermediate_size": 128},
}
EAGER = {"enforce_eager": True, "kv_cache_memory_bytes": 16 << 20}


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    work = tmp_path_factory.mktemp("bench")
    model = work / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MIXTURE))
    job = Job(
        model=str(model),
        work_dir=work / "work",
        formats=("nested-kv4",),
        lengths=(LENGTHS,),
        batches=("1", "3", "full"),
        most=8,
        engine_args=EAGER,
    )
    found = check_job(job)
    with opened(job.work_dir):
        run._prepare(found, describe())
    return found


def test_an_engine_measures_its_cases_largest_first_and_once(checked):
    """A mixture of experts with dummy weights, of which nothing but `config.json` is there."""
    work = checked.job.work_dir
    command = [sys.executable, "-m", "vllm_qoq.bench.serving.engine"]
    command += [work / "nested-kv4.json", work / "nested-kv4.jsonl"]
    first = run_warm(command, timeout=300)
    assert first.returncode == 0, first.stderr[-3000:]
    facts, measured = read(work / "nested-kv4.jsonl")
    assert [one.batch for one in measured] == [8, 3, 1]
    assert facts.pool_tokens >= 8 * LENGTHS.tokens and facts.start_seconds > 0
    for one in measured:
        assert 0 < one.prompts_seconds < one.seconds
        assert 0 < one.step_seconds < one.seconds
    # One request takes its prompt, and a step for each token after the first.
    alone = measured[-1]
    steps = alone.prompts_seconds + (LENGTHS.new - 1) * alone.step_seconds
    assert steps == pytest.approx(alone.seconds, rel=0.1)
    (subject,) = checked.subjects
    assert run._is_complete(subject, facts, measured)
    assert not run._is_complete(subject, facts, measured[:2])


class Worker(RandomWeights):
    """A worker of vLLM with an embedding, an lm_head and a layer whose weight has this name."""

    def __init__(self, name, dtype):
        self.model = torch.nn.Module()
        with tensor_parallel(0, 1, vllm_config()):
            module = vocab_parallel_embedding
            self.model.embed_tokens = module.VocabParallelEmbedding(64, 64)
            self.model.lm_head = module.ParallelLMHead(64, 64)
        for parameter in self.model.parameters():
            parameter.data.fill_(1e-3)
        zeros = torch.zeros(3, 2000, 64, dtype=dtype)
        self.model.layer = torch.nn.Module()
        self.weight = torch.nn.Parameter(zeros, requires_grad=False)
        self.model.layer.register_parameter(name, self.weight)

    def get_model(self):
        return self.model


@pytest.mark.parametrize("name", ["w13_weight", "w2_weight", "w13_weight_packed", "weight"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn])
def test_dummy_experts_are_random_and_what_routers_read_is_large(name, dtype):
    worker = Worker(name, dtype)
    assert worker.fill_random_weights() == 1
    assert all(expert.float().std() > 50 for expert in worker.weight)
    model, largest = worker.model, 1.0 if name != "weight" else 1e-3
    assert model.embed_tokens.weight.max().item() == pytest.approx(largest)
    assert model.lm_head.weight.max().item() == pytest.approx(1e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_knows_the_model_of_every_shape(name, tmp_path):
    config = SHAPES[name].config()
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = transformers.AutoConfig.from_pretrained(tmp_path)
    assert [f"{type(found).__name__.removesuffix('Config')}ForCausalLM"] == config["architectures"]
    # Some keys have other names there, under which these are found, too.
    assert all(getattr(found, key) == value for key, value in SHAPES[name].experts.items())
