"""A model whose transformations can be looked at one by one."""

import torch
import transformers

from vllm_qoq.quantizer import rotate, smooth
from vllm_qoq.quantizer.evaluate import round_cache
from vllm_qoq.quantizer.experts import use_linear_experts
from vllm_qoq.quantizer.model import Dimensions, blocks, layer_names
from vllm_qoq.quantizer.observe import Observer
from vllm_qoq.quantizer.parts import part_rows, rows
from vllm_qoq.quantizer.rope import rope_of
from vllm_qoq.quantizer.strength import with_rope

SIZES = {
    "hidden_size": 96,  # a Hadamard matrix that is no power of two
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
SMALL_HEADS = {"head_dim": 24}  # where transformers wants hidden_size / num_attention_heads
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
BIASES = {"attention_bias": True, "mlp_bias": True}

EXPERTS = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}

LINEAR = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 24},
    "layer_types": ["full_attention", "linear_attention"],
}
TEXT = ("Gemma3", "Qwen3_5", "Qwen3_5Moe")  # the config of the language model has another name

MODELS = {
    "llama": ("Llama", {}),
    "llama with biases": ("Llama", BIASES),
    "tied llama": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {}),
    "ministral3": ("Ministral3", {}),
    "phi3": ("Phi3", SMALL_HEADS),
    "phi3, partial rotary": ("Phi3", SMALL_HEADS | {"partial_rotary_factor": 0.75}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", TWO_KINDS | {"attn_implementation": "eager"}),
    "gemma3": ("Gemma3", TWO_KINDS),
    "granite": (
        "Granite",
        BIASES | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "olmo2": ("Olmo2", {}),
    "glm": ("Glm", {}),
    "glm4": ("Glm4", {}),
    "cohere": ("Cohere", SMALL_HEADS),
    "cohere2": ("Cohere2", SMALL_HEADS | TWO_KINDS),
    "qwen2 moe": ("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 64}),
    "qwen3 moe": ("Qwen3Moe", EXPERTS | {"mlp_only_layers": [1]}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3 next": ("Qwen3Next", LINEAR | EXPERTS | {"shared_expert_intermediate_size": 64}),
    "qwen3.5": ("Qwen3_5", LINEAR),
    "qwen3.5 moe": ("Qwen3_5Moe", LINEAR | EXPERTS | {"shared_expert_intermediate_size": 64}),
}
"""Name -> family in transformers, and what its config has besides `SIZES`."""


def build(name, **changes):
    """A random model of `MODELS` in float64, with `changes` to its config."""
    family, own = MODELS[name]
    text = "Text" if family in TEXT else ""
    config = getattr(transformers, f"{family}{text}Config")(**SIZES | own | changes)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval().double()


class Model:
    """A random model in float64, so that a step's own rounding cannot hide a mistake."""

    def __init__(self, name, has_linear_experts=True):
        self.model = build(name)
        config = self.model.config
        with torch.no_grad():
            for tensor in self.model.parameters():
                if tensor.ndim == 1:  # norms and biases, which are born as ones and zeros
                    tensor.add_(torch.randn_like(tensor) * 0.3)
        content = config.to_dict() | {"model_type": config.model_type}
        self.names, self.dimensions = layer_names(content), Dimensions.of(content)
        if has_linear_experts:
            use_linear_experts(self.model, self.names)
        rotate.untie(self.model, self.names)

    @torch.no_grad()
    def give_large_pair(self):
        """Make a pair of K thirty times as large, and that of Q smaller: SmoothAttention's work."""
        for index, block in enumerate(blocks(self.model, self.names)):
            if self.rope(index) is None:
                continue
            of_pair = torch.zeros(self.dimensions.head_dim // 2)
            of_pair[3] = 1
            large = self.rope(index).of_channels(of_pair).bool()
            for norm, part, factor in (
                (self.names.k_norm, "k", 30),
                (self.names.q_norm, "q", 1 / 30),
            ):
                if norm is None:
                    layer = rows(block, part, self.names, self.dimensions)
                    for parameter in (layer.weight, layer.bias):
                        if parameter is not None:
                            parameter.unflatten(0, (-1, len(large)))[:, large] *= factor
                    continue
                weight, offset = block.get_submodule(norm).weight, self.names.norm_offset
                heads = weight.data.view(-1, len(large))
                heads[:, large] = (heads[:, large] + offset) * factor - offset

    @torch.no_grad()
    def logits(self):
        tokens = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1))
        return self.model(tokens).logits

    def smooth(self, index=None, **options):
        """Smooth one block or all, with what random tokens show of it."""
        off = dict.fromkeys(("k_mean", "attention", "outputs", "reorder"), False)
        wanted = smooth.SmoothOptions(**off | options, key_bits=4, weight_bits=4, group_size=128)
        for i, block in enumerate(blocks(self.model, self.names)):
            if index in (None, i):
                found = smooth.transforms(
                    self.seen(i), block, self.names, self.dimensions, self.rope(i), wanted
                )
                mlps = self.names.of_block(i).mlps
                smooth.apply(block, found, self.names, self.dimensions, mlps)

    def rope(self, index):
        return rope_of(self.model, self.names, self.dimensions, index)

    def seen(self, index):
        block, observer = (
            blocks(self.model, self.names)[index],
            Observer(self.names, self.dimensions, self.rope(index), self.downs(index), 4),
        )
        hooks = [
            block.get_submodule(name).register_forward_hook(lambda m, a, out, see=see: see(out))
            for name, see in observer.outputs.items()
        ]
        hooks += [
            block.get_submodule(name).register_forward_pre_hook(lambda m, a, see=see: see(a[0]))
            for name, see in observer.inputs.items()
        ]
        self.logits()
        for hook in hooks:
            hook.remove()
        return observer.seen()

    def downs(self, index):
        return self.names.of_block(index).smoothed

    def seen_keys(self, index):
        """All keys of a block before RoPE, [tokens, kv_heads, head_dim]."""
        block, found = blocks(self.model, self.names)[index], []
        layer = block.get_submodule(self.names.k_norm or self.names.k)
        hook = layer.register_forward_hook(lambda module, args, output: found.append(output))
        self.logits()
        hook.remove()
        keys = found[0].transpose(1, 2) if self.names.has_heads_first else found[0]
        if self.names.k_norm is None:
            keys = keys[..., slice(*part_rows("k", self.names, self.dimensions))]
        return keys.reshape(-1, self.dimensions.kv_heads, self.dimensions.head_dim)

    def key_error(self, index):
        """What 4-bit keys cost the products with the queries."""
        seen = self.seen(index)
        keys = self.with_rope(seen)
        seen, lost = seen.attention, round_cache(keys, 4) - keys
        return float((lost * torch.cat((seen.query_pairs, seen.query_pairs), 1)).square().sum())

    def with_rope(self, seen):
        keys, positions = seen.attention.keys, seen.attention.positions
        return with_rope(keys, positions, self.rope(0).inv_freq)

    def can(self, step):
        """Whether a step is sound for the kind of the model; "all" are those that are."""
        has_fixed_stream = self.names.has_post_norms or self.names.has_mean_norms
        return step != "R1" or not has_fixed_stream

    def step(self, name):
        if name in ("R1", "all") and self.can("R1"):
            rotate.rotate_stream(self.model, self.names, self.dimensions)
        if name in ("R2", "all") and self.names.fixed_values is None:
            rotate.rotate_values(self.model, self.names, self.dimensions)
        if name in ("SmoothAttention", "all"):
            self.smooth(attention=True)
        if name in ("smooth_outputs", "all"):
            self.smooth(outputs=True)
        if name in ("reorder", "all"):
            self.smooth(reorder=True)
