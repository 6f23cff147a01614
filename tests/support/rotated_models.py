"""The tiny model with a rotated stream, and heads that draft for the original one.

The heads are fitted by least squares to what the original model does with a text, so that they are
often right, and only beside the original model's hidden states, embedding and lm_head.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from qoq_checkpoints import write_nested
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_qoq.checkpoint.format import STREAM
from vllm_qoq.quantizer import rotate
from vllm_qoq.quantizer.model import Dimensions, layer_names

TOKENS, EPS = 4096, 1e-5
LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def write_rotated(model: Path, out: Path) -> Path:
    """The nested checkpoint of the model, rotated as by `quantize`, in the folder `out`."""
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    content = source.config.to_dict() | {"model_type": source.config.model_type}
    names, dimensions = layer_names(content), Dimensions.of(content)
    rotate.untie(source, names)
    stored = rotate.way_back(source, names, dimensions)
    rotate.rotate_stream(source, names, dimensions)
    turned = out.with_name(out.name + "-float")
    source.to(torch.bfloat16).save_pretrained(turned)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (turned / file).write_bytes((model / file).read_bytes())
    write_nested(turned, out)
    tensors = load_file(out / "model.safetensors")
    stored = {name: t if t.dtype == torch.int8 else t.bfloat16() for name, t in stored.items()}
    save_file(tensors | stored, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"][STREAM] = {"rotation": "stored"}
    (out / "config.json").write_text(json.dumps(config))
    return out


class Original:
    """What the original model makes of a text, float64 [tokens, H].

    streams  before each layer, the last of them before the final norm; last  after it
    """

    @torch.no_grad()
    def __init__(self, model: Path, text: str) -> None:
        self.config = json.loads((model / "config.json").read_text())
        source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokens = AutoTokenizer.from_pretrained(model)(text)["input_ids"][:TOKENS]
        self.tokens = torch.tensor(tokens).view(-1, 256)
        before_norm: list[torch.Tensor] = []
        hook = source.model.norm.register_forward_pre_hook(
            lambda module, inputs: before_norm.append(inputs[0])
        )
        done = source.model(self.tokens, output_hidden_states=True)
        hook.remove()
        self.streams = [*(s.double() for s in done.hidden_states[:-1]), before_norm[0].double()]
        self.last = done.last_hidden_state.double()
        self.norm = source.model.norm.weight
        self.embeddings = source.model.embed_tokens(self.tokens).double()

    def write_eagle(self, out: Path) -> Path:
        """EAGLE: a linear map of the embedding of a token and the state before it."""
        fc = fit(now_and_next(self.embeddings, self.last), after(self.last))
        return self._write(out, self._layer("layers.0.") | {"fc.weight": fc}, num_hidden_layers=1)

    def write_mtp(self, out: Path) -> Path:
        """MTP as in Ernie 4.5, whose layer is that of Llama: the same of normed inputs."""
        inputs = now_and_next(norm(self.embeddings), norm(self.last))
        tensors = self._layer("model.mtp_block.0.") | {
            "model.mtp_linear_proj.0.weight": fit(inputs, after(self.last)),
            "model.mtp_emb_norm.0.weight": torch.ones(256),
            "model.mtp_hidden_norm.0.weight": torch.ones(256),
            "model.mtp_block.0.input_layernorm.weight": torch.ones(256),
        }
        own = {"architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe"}
        return self._write(out, tensors, num_nextn_predict_layers=1, **own)

    def write_eagle3(self, out: Path) -> Path:
        """EAGLE-3: a map of streams, and what the embedding adds to it, by attention to itself."""
        streams = torch.cat([self.streams[i] for i in (0, 1, 2)], dim=-1)
        combined, target = streams[:, :-1], after(self.streams[-1])
        fc = fit(combined.flatten(0, 1), target)
        states = combined @ fc.T
        inputs = torch.cat((norm(self.embeddings[:, 1:]), norm(states)), dim=-1).flatten(0, 1)
        values = fit(inputs, target - states.flatten(0, 1))
        sharp = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
        tensors = self._layer("midlayer.") | {
            "fc.weight": fc,
            "norm.weight": self.norm,
            "midlayer.hidden_norm.weight": torch.ones(256),
            "midlayer.input_layernorm.weight": torch.ones(256),
            "midlayer.self_attn.q_proj.weight": sharp,
            "midlayer.self_attn.k_proj.weight": sharp,
            "midlayer.self_attn.v_proj.weight": values,
            "midlayer.self_attn.o_proj.weight": torch.eye(256),
        }
        own = {"num_key_value_heads": 4, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
        own["architectures"] = ["LlamaForCausalLMEagle3"]
        return self._write(out, tensors, num_hidden_layers=1, **own)

    def _layer(self, prefix: str) -> dict[str, torch.Tensor]:
        """A layer of Llama that leaves the stream as it is."""
        kv, inner = self.config["num_key_value_heads"] * 64, self.config["intermediate_size"]
        rows = dict(zip((*LAYER, *MLP), (256, kv, kv, 256, inner, inner, 256), strict=True))
        columns = {"mlp.down_proj": inner}
        tensors = {f"{n}.weight": torch.zeros(r, columns.get(n, 256)) for n, r in rows.items()}
        tensors["post_attention_layernorm.weight"] = torch.ones(256)
        return {prefix + name: tensor for name, tensor in tensors.items()}

    def _write(self, out: Path, tensors: dict[str, torch.Tensor], **own: Any) -> Path:
        out.mkdir()
        stored = {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}
        save_file(stored, out / "model.safetensors", {"format": "pt"})
        (out / "config.json").write_text(json.dumps(self.config | own))
        return out


def now_and_next(embeddings: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """What a head reads: the embedding of a token, and the state that it came from."""
    return torch.cat((embeddings[:, 1:], states[:, :-1]), dim=-1).flatten(0, 1)


def after(states: torch.Tensor) -> torch.Tensor:
    """What a head stands for: the state that comes of that token."""
    return states[:, 1:].flatten(0, 1)


def norm(states: torch.Tensor) -> torch.Tensor:
    return states * (states.square().mean(-1, keepdim=True) + EPS).rsqrt()


def fit(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """The matrix [N, K] that makes `outputs` [tokens, N] of `inputs` [tokens, K]."""
    gram = inputs.T @ inputs
    gram += torch.eye(len(gram)) * gram.diagonal().mean() * 1e-5
    return torch.linalg.solve(gram, inputs.T @ outputs).T
