"""What `merge` writes, `verify` accepts; what it does not write, it refuses by name."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qoq_checkpoints import PER_CHANNEL, round_to_nearest
from safetensors.torch import save_file

from merge_tools.__main__ import main
from vllm_qoq.checkpoint import verify
from vllm_qoq.models.tensors import EMBEDDING, HEAD, expected_tensors
from vllm_qoq.progress import Progress
from vllm_qoq.quantizer.sets import SetKind

CONFIG = {
    **{"vocab_size": 24, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "dtype": "bfloat16"},
}
MODELS = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "biased": {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
    "tied": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 1},
    "phi3": {"architectures": ["Phi3ForCausalLM"]},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"]},
    "unknown": {"architectures": ["SomethingForCausalLM"]},
}
QOQ = {"quant_method": "qoq_linear", "ignore": ["lm_head"]}
METHODS = {
    "w8a8": SetKind("w8a8", 128).config(),
    "w4a8": QOQ | {"group_size": 128},
    "w4a8fine": QOQ | {"group_size": 32},
    "w4a8channel": QOQ | {"group_size": PER_CHANNEL},
}


def model(kind: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """config.json and tensors of a model in bf16."""
    config = CONFIG | MODELS[kind]
    table = config if kind != "unknown" else config | {"architectures": ["LlamaForCausalLM"]}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).mul(0.1).bfloat16()
        for name, shape in expected_tensors(table).items()
    }
    return config, tensors


def quantized(method: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a set, by rounding."""
    result = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if not layer.endswith("_proj"):
            result[name] = tensor
        elif method == "w8a8":
            scale = tensor.float().abs().amax(1, keepdim=True) / 127
            result[name] = (tensor / scale).round().to(torch.int8)
            result[f"{layer}.weight_scale"] = scale
        else:
            leaves = round_to_nearest(tensor, METHODS[method]["group_size"])
            result |= {f"{layer}.{leaf}": value for leaf, value in leaves.items()}
    return result


def _scaled(leaf: str, factor: float):
    def change(config, tensors, name):
        if leaf in name:
            tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)

    return change


def _set_first(value: float):
    def change(config, tensors, name):
        flat = tensors[name].clone().reshape(-1)
        flat[0] = value if flat.is_floating_point() else 127
        tensors[name] = flat.reshape(tensors[name].shape)

    return change


def _lose(config, tensors, name):
    del tensors[name]


def _fewer_rows(config, tensors, name):
    tensors[name] = tensors[name][:-1].clone()


def _other_name(config, tensors, name):
    tensors[f"{name}.more"] = tensors[name].clone()


def _a_bias(config, tensors, name):
    layer = name.rpartition(".")[0]
    tensors[f"{layer}.bias"] = torch.ones(tensors[name].shape[:1])


def _no_bias(config, tensors, name):
    layer = name.rpartition(".")[0]
    tensors[f"{layer}.bias"] = torch.zeros(tensors[name].shape[:1])


def _a_head(config, tensors, name):
    tensors[HEAD] = tensors[EMBEDDING].clone()


def _another_head(config, tensors, name):
    tensors[HEAD] = tensors[EMBEDDING] * 2


def _other_size(config, tensors, name):
    key = ("vocab_size", "hidden_size", "intermediate_size", "head_dim")[len(name) % 4]
    config[key] *= 2


CHANGES = [
    *(_set_first(float("nan")), _set_first(float("inf")), _set_first(-1), _set_first(0)),
    *(_set_first(127), _lose, _fewer_rows, _other_name, _a_bias, _no_bias),
    *(_a_head, _another_head, _other_size),
    *(_scaled("group_offset", -1), _scaled("group_scale", 9), _scaled("group_scale", 0)),
]


@st.composite
def checkpoints(draw):
    """Name -> (config, tensors) of two or three sets, one of which may be damaged."""
    config, tensors = model(draw(st.sampled_from(sorted(MODELS))))
    methods = draw(st.lists(st.sampled_from(sorted(METHODS)), min_size=2, max_size=2, unique=True))
    sets = {
        method: (config | {"quantization_config": METHODS[method]}, quantized(method, tensors))
        for method in methods
    }
    if draw(st.booleans()):
        chosen = list(draw(st.sampled_from(sorted(sets.items()))))
        name = draw(st.sampled_from(sorted(chosen[1][1])))
        draw(st.sampled_from(CHANGES))(*chosen[1], name)
        if draw(st.booleans()):  # the same in all of them, where no comparison tells
            for other_config, others in sets.values():
                for key in CONFIG:
                    other_config[key] = chosen[1][0][key]
                if name in others and name not in chosen[1][1]:
                    del others[name]
    return sets


@given(checkpoints(), st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_merge_writes_verify_accepts(sets, has_nest):
    with tempfile.TemporaryDirectory() as folder:
        arguments = []
        for name, (config, tensors) in sets.items():
            path = Path(folder) / name
            path.mkdir()
            save_file(tensors, path / "model.safetensors", {"format": "pt"})
            (path / "config.json").write_text(json.dumps(config))
            arguments.append(f"{name}={path}")
        out = Path(folder) / "out"
        options = ["--nest"] if has_nest and set(sets) == {"w8a8", "w4a8"} else []
        before, sys.argv = sys.argv, ["merge_tools", "merge", *arguments, "-o", str(out), "-q"]
        sys.argv += options
        try:
            code = main()
        finally:
            sys.argv = before
        if code == 0:
            assert verify.structure(out) == []
            assert verify.contents(out, Progress(quiet=True)) == []
        else:
            assert code == 2 and not out.exists()
