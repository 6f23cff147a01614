"""LoRA adapters on routed layers, against transformers with the adapter added to the weights."""

import pytest
import torch
import transformers
from cpu_kernels import needs_exact_int8, needs_wna16
from engine_process import run_engines
from engines import TRACED, adapter, engine, generate, largest_gap
from lora_adapters import products, write_adapter
from vllm import SamplingParams

import vllm_qoq
from vllm_qoq.checkpoint.float_view import FloatView
from vllm_qoq.checkpoint.verify import open_merged
from vllm_qoq.numerics.reference import quantize_per_token

TOKENS = list(range(40, 60))
# vLLM's adapters on a CPU give a request without one what is in the last place, so one stays empty.
OPTIONS = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
# Of log-probabilities; without adapters the largest difference is 0.1, from int8 inputs that round
# differently and from weights that `FloatView` rounds to bf16.
TOLERANCE = 0.2


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(tiny_model, folder / "all", seed=1),
        write_adapter(tiny_model, folder / "some", seed=2, targets=("v_proj", "down_proj"), rank=4),
    ]


class Adapted(torch.nn.Module):
    """A layer of a set, whose inputs are int8 where the set's are, with an adapter beside it."""

    def __init__(self, weight, added, has_int8_inputs):
        super().__init__()
        self.weight, self.added, self.has_int8_inputs = weight, added, has_int8_inputs

    def forward(self, x):
        y = torch.nn.functional.linear(x, self.added)
        if self.has_int8_inputs:
            codes, scale, _ = quantize_per_token(x.flatten(0, -2))
            x = (codes * scale[:, None]).view_as(x)
        return y + torch.nn.functional.linear(x, self.weight)


def model_of(checkpoint, set_name, path):
    """One set in float32, with an adapter."""
    sets = {one.name: one for one in open_merged(checkpoint)[2]}
    view = FloatView(sets[set_name])
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**view.config)).float()
    model.load_state_dict({name: view.get(name).float() for name in view.tensors})
    added = products(path) if path is not None else {}
    for layer in sets[set_name].quantized:
        weight = model.get_submodule(layer).weight
        own = added.get(layer, torch.zeros_like(weight)).float()
        model.set_submodule(layer, Adapted(weight, own, set_name != "w4a16"))
    return model.eval()


@torch.no_grad()
def expected(checkpoint, sets, path, tokens):
    """Log-probabilities after the prompt in the first set, and after `tokens` in the second."""
    prompts, generation = (model_of(checkpoint, name, path) for name in sets)
    found = prompts(torch.tensor([TOKENS]), use_cache=True)
    rows = [found.logits[0, -1]]
    for token in tokens[:-1]:
        found = generation(
            torch.tensor([[token]]), past_key_values=found.past_key_values, use_cache=True
        )
        rows.append(found.logits[0, -1])
    return torch.stack(rows).log_softmax(-1)


def routed(prompts, generation):
    return {"routing": {"prefill": prompts, "decode": generation}, "lora": "converted"}


@pytest.mark.parametrize(
    ("folder", "sets"),
    [
        ("nested_dir", ("w8a8", "w4a8")),
        pytest.param(
            "merged_for_w4a16_dir", ("w4a16", "w8a8"), marks=[needs_wna16, needs_exact_int8]
        ),
    ],
)
def test_every_request_gets_its_adapter_in_the_set_of_its_step(request, folder, sets, adapters):
    checkpoint = request.getfixturevalue(folder)
    llm = engine(checkpoint, routed(*sets), **OPTIONS, **TRACED)
    before = vllm_qoq.step_counts(llm)
    sampling = SamplingParams(temperature=0, max_tokens=3, logprobs=8, ignore_eos=True)
    prompts = [{"prompt_token_ids": TOKENS}] * 3
    given = [None, *adapters]
    requests = [adapter(path) for path in given]
    outputs = llm.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
    counts = {key: n - before[key] for key, n in vllm_qoq.step_counts(llm).items() if n}
    assert {key: n for key, n in counts.items() if n} == {
        ("prefill", sets[0]): 1,
        ("decode", sets[1]): 2,
    }
    effects, gaps = [], []
    for output, path in zip(outputs, given, strict=True):
        tokens = output.outputs[0].token_ids
        rows = expected(checkpoint, sets, path, tokens)
        without = expected(checkpoint, sets, None, tokens)
        for row, plain, position in zip(rows, without, output.outputs[0].logprobs, strict=True):
            for token, entry in position.items():
                gaps.append(abs(entry.logprob - float(row[token])))
            effects.append(max(abs(float((row - plain)[token])) for token in position))
    assert max(gaps) < TOLERANCE
    assert max(effects[:3]) == 0 and min(effects[3:]) > 3 * TOLERANCE


def test_two_ranks_give_what_one_does(nested_dir, adapters, tmp_path):
    given = [str(adapters[0]), None, str(adapters[1]), None]
    qoq = routed("w8a8", "w4a8")
    ranks = {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 32 << 20}
    spec = {"checkpoint": str(nested_dir), "qoq": qoq, "options": OPTIONS | ranks, "max_tokens": 3}
    (found,) = run_engines(tmp_path, [spec | {"adapters": given}], VLLM_CPU_OMP_THREADS_BIND="0|1")
    alone = engine(nested_dir, qoq, **OPTIONS, **TRACED)
    with_adapters = generate(alone, max_tokens=3, adapters=given)
    # A rank rounds its part of the inputs to int8 with a scale of its own.
    assert largest_gap(found["generation"], with_adapters) < 2 * TOLERANCE
    assert largest_gap(found["generation"], generate(alone, max_tokens=3)) > 4 * TOLERANCE
    assert found["counts"]["prefill w8a8"] and found["counts"]["decode w4a8"] == 2
