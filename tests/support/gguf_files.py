"""GGUF files of the test model, written by the package gguf as llama.cpp's converter does."""

import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"


def write_gguf(
    model: Path,
    file: Path,
    *,
    tied: bool = False,
    quantized: bool = False,
    pre: str = "gpt-2",
    kind: str = "gpt2",
    without: str | None = None,
    sizes: dict[str, int] | None = None,
    token: dict | None = None,
    keys: dict | None = None,
    tensors: dict | None = None,
) -> Path:
    """Write `model` as a GGUF file.

    tied       leave the lm_head out, as llama.cpp does where it is the embedding
    quantized  the linear layers in Q8_0
    pre        the name of the way to split text
    kind       the name of the kind of tokenizer
    without    a key to leave out
    sizes      numbers in the place of the model's, by their keys without the architecture
    token      values of keys of the tokenizer, by their names without "tokenizer.ggml."
    keys       more keys, name -> text or number
    tensors    more tensors
    """
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, model, config, pre, kind)
    written = writer.kv_data[0]
    for key, value in (sizes or {}).items():
        written[f"llama.{key}"].value = value
    for key, value in (token or {}).items():
        kind = gguf.GGUFValueType.BOOL if isinstance(value, bool) else gguf.GGUFValueType.UINT32
        written[f"tokenizer.ggml.{key}"] = gguf.GGUFValue(value, kind)
    if without is not None:
        written.pop(without, None)
    for key, value in (keys or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, tensor in load_file(model / "model.safetensors").items():
        place = name.removesuffix(".weight").removeprefix("model.layers.")
        index, _, layer = place.partition(".")
        is_layer = index.isdigit()
        leaf = NAMES[layer if is_layer else place]
        if leaf == "output" and tied:
            continue
        values = tensor.float()
        if leaf in heads:  # llama.cpp's RoPE turns neighbours
            n = heads[leaf]
            values = values.view(n, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        full = f"blk.{index}.{leaf}.weight" if is_layer else f"{leaf}.weight"
        data, kind = values.numpy(), None
        if quantized and is_layer and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quantize(data, kind)
        writer.add_tensor(full, data, raw_dtype=kind)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: gguf.GGUFWriter, model: Path, config: dict, pre: str, kind: str) -> None:
    stored = json.loads((model / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    special = {token["id"] for token in stored["added_tokens"]}
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3 if i in special else 1 for i in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in stored["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_chat_template(TEMPLATE)


def llama3_frequencies(head_dim: int, theta: float, factor: float) -> torch.Tensor:
    """What llama.cpp's converter writes for Llama 3.1: a divisor for each frequency."""
    found = []
    for i in range(head_dim // 2):
        wavelength = 2 * torch.pi * theta ** (2 * i / head_dim)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192 / 1:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(found)
