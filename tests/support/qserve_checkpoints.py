"""Checkpoints as QServe and deepcompressor write them, of random numbers."""

import numpy as np
import torch

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "tie_word_embeddings": True,
}


SHAPES = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (384, 256),
    "mlp.up_proj": (384, 256),
    "mlp.down_proj": (256, 384),
}


LINEARS = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in SHAPES.items()}


def packed_codes(codes: torch.Tensor) -> torch.Tensor:
    """QServe's `qweight`, written down code by code from the rule for its bytes."""
    n, k = codes.shape
    row, column = np.meshgrid(np.arange(n), np.arange(k), indexing="ij")
    r, c = row % 32, column % 32
    byte = (r % 8) * 64 + ((c // 4) % 4) * 16 + (c // 16) * 8 + ((r // 8) % 2) * 4 + c % 4
    place = (row // 32 * (k // 32) + column // 32) * 512 + byte
    flat = np.zeros(n * k // 2, dtype=np.uint8)
    np.add.at(flat, place, codes.numpy().astype(np.uint8) << (4 * (r // 16)).astype(np.uint8))
    return torch.from_numpy(flat.view(np.int8).reshape(n, k // 2))


def permuted(values: torch.Tensor, order: str) -> torch.Tensor:
    """[N, groups] as QServe or deepcompressor stores it."""
    places = {
        "qserve": lambda r: r % 8 * 4 + r // 8,
        "deepcompressor": lambda r: r // 16 * 16 + r % 8 * 2 + r // 8 % 2,
    }
    stored = torch.empty_like(values)
    for n in range(values.shape[0]):
        stored[n // 32 * 32 + places[order](n % 32)] = values[n]
    return stored.t().contiguous().to(torch.int8)


def random_scale(n: int) -> torch.Tensor:
    return (torch.rand(n) * 0.01 + 0.002).half()


def two_levels(
    n: int, k: int, is_ambiguous: bool = False, group_size: int = 128
) -> dict[str, torch.Tensor]:
    """Codes, scales and integer zero points of which many make `s2_zeros` wrap."""
    scale = torch.randint(1, 17, (n, k // group_size))
    zero = torch.full_like(scale, 8) if is_ambiguous else torch.randint(0, 16, scale.shape)
    low = (-128 / scale + zero).ceil().clamp(0, 15)[:, :, None]
    high = (127 / scale + zero).floor().clamp(0, 15)[:, :, None]
    codes = (low + torch.rand(n, k // group_size, group_size) * (high - low)).round().long()
    channel = random_scale(n)
    level1 = ((codes - zero[:, :, None]) * scale[:, :, None]).view(n, k)
    assert level1.min() >= -128 and level1.max() <= 127
    return {
        "codes": codes.view(n, k),
        "channel": channel,
        "scale": scale,
        "zero": zero,
        "weight": level1.float() * channel.float()[:, None],
    }


def g128(n: int, k: int, order: str = "qserve", is_ambiguous: bool = False, group_size: int = 128):
    parts = two_levels(n, k, is_ambiguous, group_size)
    offset = -parts["zero"] * parts["scale"]
    wrapped = (offset + 128) % 256 - 128
    leaves = {
        "qweight": packed_codes(parts["codes"]),
        "s1_scales": parts["channel"],
        "s2_scales": permuted(parts["scale"], order),
        "s2_zeros": permuted(wrapped, order),
    }
    return leaves, parts["weight"]


def plain_tensors() -> dict[str, torch.Tensor]:
    tensors = {
        "model.embed_tokens.weight": torch.randn(96, 256).half(),
        "lm_head.weight": torch.randn(96, 256).half(),
        "model.norm.weight": torch.ones(256).half(),
    }
    for i in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.rand(256).half()
    return tensors


def model(make) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A whole checkpoint of layers that `make` makes, and the weights that it stands for."""
    torch.manual_seed(0)
    tensors, weights = plain_tensors(), {}
    for layer, shape in LINEARS.items():
        leaves, weights[layer] = make(*shape)
        tensors |= {f"{layer}.{leaf}": value for leaf, value in leaves.items()}
    return tensors, weights
