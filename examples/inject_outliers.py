"""Give a model the outliers that large models have, without changing what it computes.

    python examples/inject_outliers.py MODEL OUT [--seed 0]

Small models have none, so they cannot tell quantizers apart. The script makes these larger, each
time with the inverse in the weights that read them:

    4 channels of every norm's output, 30 to 100 times
    2 pairs of every key head (channels i and i + D/2, which RoPE mixes), 8 to 16 times
    4 channels of every value head, 8 to 16 times
    4 channels of the MLP's inner product, 16 to 64 times

Factors are powers of two where possible, so that bf16 weights stay exact. The float
logits before and after are compared; the command fails if they differ by more than 1 %.
"""

import argparse
import json
from pathlib import Path

import torch

NORM_FACTORS, KEY_FACTORS = (32.0, 64.0), (8.0, 16.0)
VALUE_FACTORS, INNER_FACTORS = (8.0, 16.0), (16.0, 32.0, 64.0)
TOLERANCE = 0.01


class Chooser:
    """A source of random channels and factors, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def factors(self, size: int, count: int, values: tuple[float, ...]) -> torch.Tensor:
        """Choose factors float32 [size]: one of `values` in `count` places, 1 elsewhere."""
        chosen = torch.randperm(size, generator=self.generator)[:count]
        which = torch.randint(len(values), (count,), generator=self.generator)
        result = torch.ones(size)
        result[chosen] = torch.tensor(values)[which]
        return result


@torch.no_grad()
def inject(model: torch.nn.Module, seed: int) -> None:
    """Change the weights of a Llama-like model in place."""
    config, choose = model.config, Chooser(seed)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = config.num_key_value_heads
    shared = config.num_attention_heads // kv_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = (attention.q_proj, attention.k_proj, attention.v_proj)
        for norm, linears in (
            (layer.input_layernorm, readers),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            up = choose.factors(config.hidden_size, 4, NORM_FACTORS)
            norm.weight.mul_(up)
            for linear in linears:
                linear.weight.div_(up)
        pairs = torch.stack([choose.factors(head // 2, 2, KEY_FACTORS) for _ in range(kv_heads)])
        keys = torch.cat((pairs, pairs), 1)
        attention.k_proj.weight.mul_(keys.reshape(-1, 1))
        attention.q_proj.weight.div_(keys.repeat_interleave(shared, 0).reshape(-1, 1))
        values = torch.stack([choose.factors(head, 4, VALUE_FACTORS) for _ in range(kv_heads)])
        attention.v_proj.weight.mul_(values.reshape(-1, 1))
        attention.o_proj.weight.div_(values.repeat_interleave(shared, 0).reshape(1, -1))
        inner = choose.factors(config.intermediate_size, 4, INNER_FACTORS)
        mlp.up_proj.weight.mul_(inner[:, None])
        mlp.down_proj.weight.div_(inner)


def main() -> None:
    """Inject, compare the logits, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if any(getattr(m, "bias", None) is not None for m in model.model.modules()):
        raise SystemExit(f"error: {args.model} has biases, which this script does not scale")
    tokens = torch.randint(
        model.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(args.seed)
    )
    with torch.no_grad():
        before = model(tokens).logits
        inject(model, args.seed)
        gap = float((model(tokens).logits - before).abs().max() / before.abs().max())
    print(json.dumps({"largest_logit_gap": gap}))
    if gap > TOLERANCE:
        raise SystemExit(f"error: the logits changed by {gap:.2%}")
    model.to(AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").dtype)
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)


if __name__ == "__main__":
    main()
