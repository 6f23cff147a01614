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

HIDDEN, TOKENS, LENGTH, EPS = 256, 4096, 256, 1e-5
LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def write_rotated(model: Path, out: Path) -> Path:
    """The nested checkpoint of the model in the folder `out`, rotated and with a mean of K."""
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
    stored = {n: (t if t.dtype == torch.int8 else t.bfloat16()).cpu() for n, t in stored.items()}
    random = torch.Generator().manual_seed(0)
    for layer in range(source.config.num_hidden_layers):  # any numbers will do
        mean = torch.randn(source.config.num_key_value_heads, 64, generator=random)
        stored[f"model.layers.{layer}.self_attn.k_mean"] = mean
    save_file(tensors | stored, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= {
        STREAM: {"rotation": "stored"},
        "kv_cache": {"bits": 4, "k_mean": True},
    }
    (out / "config.json").write_text(json.dumps(config))
    return out


class Original:
    """What the original model makes of a text, float64 [texts, tokens, H].

    streams    before each layer, the last of them before the final norm; last  after it
    embedding  that of the model, and its `lm_head`, [V, H]
    expected   method -> what the head takes from the model and what it makes of that
    """

    @torch.no_grad()
    def __init__(self, model: Path, text: str) -> None:
        self.config = json.loads((model / "config.json").read_text())
        source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokens = AutoTokenizer.from_pretrained(model)(text)["input_ids"][:TOKENS]
        self.tokens = torch.tensor(tokens).view(-1, LENGTH)
        before_norm: list[torch.Tensor] = []
        hook = source.model.norm.register_forward_pre_hook(
            lambda module, inputs: before_norm.append(inputs[0])
        )
        done = source.model(self.tokens, output_hidden_states=True)
        hook.remove()
        self.streams = [*(s.double() for s in done.hidden_states[:-1]), before_norm[0].double()]
        self.last = done.last_hidden_state.double()
        self.embedding, self.lm_head, self.norm = (
            layer.weight.double()
            for layer in (source.model.embed_tokens, source.lm_head, source.model.norm)
        )
        self.expected: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def write(self, method: str, out: Path) -> Path:
        """Write a head for `method` into the folder `out`."""
        written: Path = getattr(self, f"_write_{method}")(out)
        return written

    def _write_eagle(self, out: Path) -> Path:
        """A linear map of the embedding of a token and the state before it."""
        rows = self.embedding[self.tokens[:, 1:]]
        inputs = torch.cat((rows, self.last[:, :-1]), dim=-1)
        fc = fit(inputs, self.last[:, 1:])
        self.expected["eagle"] = self.last, inputs @ fc.T
        return self._save(out, self._layer("layers.0.") | {"fc.weight": fc}, num_hidden_layers=1)

    def _write_mtp(self, out: Path) -> Path:
        """The same of normed inputs, as in Ernie 4.5, whose layer is that of Llama."""
        rows = self.embedding[self.tokens[:, 1:]]
        inputs = torch.cat((normed(rows), normed(self.last[:, :-1])), dim=-1)
        fc = fit(inputs, self.last[:, 1:])
        self.expected["mtp"] = self.last, inputs @ fc.T
        tensors = self._layer("model.mtp_block.0.") | {
            "model.mtp_linear_proj.0.weight": fc,
            "model.mtp_emb_norm.0.weight": torch.ones(HIDDEN),
            "model.mtp_hidden_norm.0.weight": torch.ones(HIDDEN),
            "model.mtp_block.0.input_layernorm.weight": torch.ones(HIDDEN),
        }
        own = {"architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe"}
        return self._save(out, tensors, num_nextn_predict_layers=1, **own)

    def _write_eagle3(self, out: Path) -> Path:
        """A map of two streams, and what the embedding adds to it, by attention to itself.

        Not of the first layer's: on a GPU vLLM hands on a tensor that later layers write into.
        """
        streams, target = torch.cat(self.streams[1:], dim=-1), self.streams[-1][:, 1:]
        fc = fit(streams[:, :-1], target)
        taken = streams @ fc.T
        rows, states = self.embedding[self.tokens[:, 1:]], taken[:, :-1]
        inputs = torch.cat((normed(rows), normed(states)), dim=-1)
        values = fit(inputs, target - states)
        self.expected["eagle3"] = taken, normed(states + inputs @ values.T) * self.norm
        sharp = torch.randn(HIDDEN, 2 * HIDDEN, generator=torch.Generator().manual_seed(0))
        tensors = self._layer("midlayer.") | {
            "fc.weight": fc,
            "norm.weight": self.norm,
            "midlayer.hidden_norm.weight": torch.ones(HIDDEN),
            "midlayer.input_layernorm.weight": torch.ones(HIDDEN),
            "midlayer.self_attn.q_proj.weight": sharp,
            "midlayer.self_attn.k_proj.weight": sharp,
            "midlayer.self_attn.v_proj.weight": values,
            "midlayer.self_attn.o_proj.weight": torch.eye(HIDDEN),
        }
        own = {"num_key_value_heads": 4, "eagle_aux_hidden_state_layer_ids": [1, 2]}
        own["num_aux_hidden_states"] = 2
        own["architectures"] = ["LlamaForCausalLMEagle3"]
        return self._save(out, tensors, num_hidden_layers=1, **own)

    def _write_medusa(self, out: Path) -> Path:
        """Linear maps of the last state, one for each token that is drafted."""
        tensors = {}
        for i in range(3):
            further = fit(self.last[:, : -1 - i], self.last[:, 1 + i :])
            tensors[f"blocks.{i}.layers.0.weight"] = torch.zeros(HIDDEN, HIDDEN)
            tensors[f"lm_heads.{i}.weight"] = self.lm_head @ further
        own = {"architectures": ["MedusaModel"], "model_type": "medusa", "num_heads": 3}
        return self._save(out, tensors, num_hidden_layers=1, **own)

    def _layer(self, prefix: str) -> dict[str, torch.Tensor]:
        """A layer of Llama that leaves the stream as it is."""
        kv, inner = self.config["num_key_value_heads"] * 64, self.config["intermediate_size"]
        rows = dict(
            zip((*LAYER, *MLP), (HIDDEN, kv, kv, HIDDEN, inner, inner, HIDDEN), strict=True)
        )
        columns = {"mlp.down_proj": inner}
        tensors = {f"{n}.weight": torch.zeros(r, columns.get(n, HIDDEN)) for n, r in rows.items()}
        tensors["post_attention_layernorm.weight"] = torch.ones(HIDDEN)
        return {prefix + name: tensor for name, tensor in tensors.items()}

    def _save(self, out: Path, tensors: dict[str, torch.Tensor], **own: Any) -> Path:
        out.mkdir()
        stored = {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}
        save_file(stored, out / "model.safetensors", {"format": "pt"})
        (out / "config.json").write_text(json.dumps(self.config | own))
        return out


def normed(states: torch.Tensor) -> torch.Tensor:
    return states * (states.square().mean(-1, keepdim=True) + EPS).rsqrt()


def fit(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """The matrix [N, K] that makes `outputs` [..., N] of `inputs` [..., K]."""
    inputs, outputs = inputs.flatten(0, 1), outputs.flatten(0, 1)
    gram = inputs.T @ inputs
    gram += torch.eye(len(gram)) * gram.diagonal().mean() * 1e-5
    return torch.linalg.solve(gram, inputs.T @ outputs).T
