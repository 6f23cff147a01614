"""Write W8A8 and W4A16 checkpoints of one random model, to measure speed without a download.

    python examples/make_random_checkpoints.py OUT [--layers 32] [--only-configs]

The shape is Llama-3-8B's. Both checkpoints quantize the same random weights by
rounding, and W8A8 moves random scales from the norms into the weights, as
SmoothQuant does; so they merge like a trained pair, with an input_ratio for W4A16.
OUT/w8a8 and OUT/w4a16 take 9.1 and 5.7 GB. The text that such a model produces
means nothing. `--only-configs` writes no weights, for `--load-format dummy`, and
adds OUT/nested (prompts in W8A8, as a residual on W4A8); each has a tokenizer in
which every token is a word. Speed in single formats needs none of these:
`vllm-qoq bench serving llama-3-8b` makes what it measures.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from vllm_qoq.bench.serving.online.tokenizer import write_tokenizer

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 14336, 128256
HEADS, KV_HEADS, HEAD = 32, 8, 128
GROUP = 128
LINEARS = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
READ_A_NORM = tuple(name for name in LINEARS if name.split(".")[1] not in ("o_proj", "down_proj"))
NORMS = ("input_layernorm", "post_attention_layernorm")
WEIGHTS = {
    "w8a8": {"num_bits": 8, "strategy": "channel"},
    "w4a16": {"num_bits": 4, "strategy": "group", "group_size": GROUP},
}


NESTED = {
    "quant_method": "qoq",
    "format_version": 1,
    "sets": {
        "w8a8": {"quant_method": "qoq_residual", "base": "w4a8"},
        "w4a8": {"quant_method": "qoq_linear", "group_size": GROUP, "ignore": ["lm_head"]},
    },
    "routing": {"prefill": "w8a8", "decode": [{"set": "w4a8"}]},
}


def config(scheme: str, layers: int) -> dict:
    """Make the config.json of one checkpoint."""
    if scheme == "nested":
        return {**config("w8a8", layers), "quantization_config": NESTED}
    integer = {"type": "int", "symmetric": True}
    activations = {"num_bits": 8, **integer, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": {**WEIGHTS[scheme], **integer, "dynamic": False},
        "input_activations": activations if scheme == "w8a8" else None,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "int-quantized" if scheme == "w8a8" else "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        },
    }


def int8_per_channel(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Make the tensors of W8A8 for a weight float [N, K]."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale.bfloat16()}


def int4_per_group(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Make the tensors of W4A16 for a weight float [N, K]: codes + 8, from the low bits up."""
    n, k = weight.shape
    groups = weight.view(n, k // GROUP, GROUP)
    scale = groups.abs().amax(2) / 7.5
    codes = (groups / scale[:, :, None]).round().clamp(-8, 7).to(torch.int32) + 8
    words = codes.view(n, k // 8, 8)
    packed = torch.zeros(n, k // 8, dtype=torch.int32, device=weight.device)
    for i in range(8):
        packed |= words[:, :, i] << (4 * i)
    return {
        "weight_packed": packed,
        "weight_scale": scale.bfloat16(),
        "weight_shape": torch.tensor([n, k]),
    }


def random_scales(device: str) -> torch.Tensor:
    """Make random powers of two, so that bf16 holds the quotient of the norms exactly."""
    return torch.randint(-1, 3, (HIDDEN,), device=device).exp2().bfloat16()


class Writer:
    """A writer of one checkpoint, a shard per call."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.weight_map, self.size = folder, {}, 0
        folder.mkdir(parents=True)

    def shard(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{name}.safetensors"
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, self.folder / file)
        self.weight_map |= dict.fromkeys(tensors, file)
        self.size += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self, config: dict) -> None:
        index = {"metadata": {"total_size": self.size}, "weight_map": self.weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (self.folder / "config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    """Make the weights layer by layer and write both versions of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--only-configs", action="store_true")
    args = parser.parse_args()
    if args.only_configs:
        for scheme in (*WEIGHTS, "nested"):
            Writer(args.out / scheme).finish(config(scheme, args.layers))
            write_tokenizer(args.out / scheme, VOCABULARY)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).mul_(shape[-1] ** -0.5)

    writers = {scheme: Writer(args.out / scheme) for scheme in WEIGHTS}
    ones = torch.ones(HIDDEN, device=device, dtype=torch.bfloat16)
    shared = {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN).bfloat16(),
        "lm_head.weight": random(VOCABULARY, HIDDEN).bfloat16(),
        "model.norm.weight": ones,
    }
    for writer in writers.values():
        writer.shard("shared", shared)
    for i in tqdm(range(args.layers), desc="layers", mininterval=5):
        layer = f"model.layers.{i}"
        smooth = random_scales(device)
        shards: dict[str, dict[str, torch.Tensor]] = {
            scheme: {f"{layer}.{norm}.weight": weight.clone() for norm in NORMS}
            for scheme, weight in (("w8a8", 1 / smooth), ("w4a16", ones))
        }
        for name, shape in LINEARS.items():
            weight = random(*shape)
            smoothed = weight * smooth.float() if name in READ_A_NORM else weight
            versions = {"w8a8": int8_per_channel(smoothed), "w4a16": int4_per_group(weight)}
            for scheme, leaves in versions.items():
                shards[scheme] |= {f"{layer}.{name}.{leaf}": t for leaf, t in leaves.items()}
        for scheme, writer in writers.items():
            writer.shard(f"layer-{i:02d}", shards[scheme])
    for scheme, writer in writers.items():
        writer.finish(config(scheme, args.layers))


if __name__ == "__main__":
    main()
