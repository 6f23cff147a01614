"""Tiny random models of images and text, of the real classes, with all files that serving needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from vllm_qoq.checkpoint.float_view import FloatView
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.checkpoint.language import language_set
from vllm_qoq.checkpoint.stored_set import StoredSet
from vllm_qoq.models.vision import language_config, language_name, whole_name
from vllm_qoq.quantizer.evaluate import int8_inputs, linears
from vllm_qoq.quantizer.experts import use_linear_experts
from vllm_qoq.quantizer.model import layer_names

_TEXT = {
    **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 1032},
    **{"max_position_embeddings": 512, "initializer_range": 0.1},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_IDS = {
    **{"vision_start_token_id": 1024, "vision_end_token_id": 1025},
    **{"image_token_id": 1026, "video_token_id": 1027},
}
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# The mean and deviation of CLIP's images, which vLLM looks for here.
_PIXELS = {
    **{"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_QWEN_PIXELS = _PIXELS | {"size": {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}}
_CLIP = {
    **{"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 96},
    **{"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56, "patch_size": 14},
}
_OF_CLIP = "vision_tower.vision_model"
_LLAVA: Mapping[str, Any] = {
    "tokens": ("<image>",),
    "image": "<image>",
    "files": {
        "preprocessor_config.json": _PIXELS
        | {
            "image_processor_type": "CLIPImageProcessor",
            **{"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
            **{"do_resize": True, "do_center_crop": True, "do_convert_rgb": True, "resample": 3},
            "processor_class": "LlavaProcessor",
        },
        "processor_config.json": {
            **{"processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": 14},
            **{"num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
        },
    },
}


def _llava(kind: str) -> dict[str, Any]:
    text = _TEXT | {"model_type": kind}
    return {
        **{"text_config": text, "vision_config": _CLIP},
        **{"image_token_index": 1024, "image_seq_length": 16},
    }


_QWEN3: Mapping[str, Any] = {
    "tokens": _QWEN_TOKENS,
    "image": _QWEN_IMAGE,
    "files": {
        "preprocessor_config.json": _QWEN_PIXELS
        | {
            **{"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16},
            "processor_class": "Qwen3VLProcessor",
        },
    },
}
_LINEAR = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 64, "linear_value_head_dim": 64},
    "layer_types": ["linear_attention", "full_attention"],
}
_EXPERTS = {
    **{"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2},
    "shared_expert_intermediate_size": 64,
}


def _qwen3_5(own: Mapping[str, Any]) -> dict[str, Any]:
    # Sixteen channels of a head turn, by three positions.
    sections = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    rope = _SECTIONS | sections | {"partial_rotary_factor": 0.25}
    return _QWEN_IDS | {
        "text_config": {**_TEXT, **own, "rope_parameters": rope},
        "vision_config": {
            **{"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96},
            **{"out_hidden_size": 128, "num_position_embeddings": 16},
        },
    }


MODELS: Mapping[str, Mapping[str, Any]] = {
    "Qwen2_5_VL": {
        "config": _QWEN_IDS
        | {
            "text_config": _TEXT | {"rope_parameters": _SECTIONS},
            "vision_config": {
                **{"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96},
                **{"out_hidden_size": 128, "fullatt_block_indexes": [1], "window_size": 56},
            },
        },
        "tokens": _QWEN_TOKENS,
        "image": _QWEN_IMAGE,
        "files": {
            "preprocessor_config.json": _QWEN_PIXELS
            | {
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": "Qwen2_5_VLProcessor",
            },
        },
    },
    "Llava": _LLAVA | {"config": _llava("llama")},
    "Llava, Qwen2": _LLAVA | {"config": _llava("qwen2")},
    "Qwen3VL": {
        "config": _QWEN_IDS
        | {
            "text_config": _TEXT | {"rope_parameters": _SECTIONS | {"mrope_interleaved": True}},
            "vision_config": {
                **{"depth": 3, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96},
                **{"out_hidden_size": 128, "deepstack_visual_indexes": [0, 1]},
                "num_position_embeddings": 16,
            },
        },
        **_QWEN3,
    },
    "Qwen3_5": {"config": _qwen3_5(_LINEAR), **_QWEN3},
    "Qwen3_5Moe": {"config": _qwen3_5(_LINEAR | _EXPERTS), **_QWEN3},
}
"""Name of the class without ForConditionalGeneration, and what sets it apart -> what to write."""


def write(name: str, folder: Path, tokenizer: Path, **text: Any) -> Path:
    """Write a model in float32, with random norms and biases.

    text  keys of the text_config
    """
    facts = MODELS[name]
    parts = {**facts["config"], "text_config": facts["config"]["text_config"] | text}
    family = name.partition(",")[0]
    config = getattr(transformers, f"{family}Config")(**parts)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:  # norms and biases, which are born as ones and zeros
                tensor.add_(torch.randn_like(tensor) * 0.2)
    model.save_pretrained(folder)
    if family == "Llava":
        _name_as_on_the_hub(folder / "model.safetensors")
    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    words.add_special_tokens({"additional_special_tokens": list(facts["tokens"])})
    words.chat_template = chat_template(facts["image"])
    words.save_pretrained(folder)
    for file, content in facts["files"].items():
        (folder / file).write_text(json.dumps(content))
    return folder


def _name_as_on_the_hub(file: Path) -> None:
    """Name CLIP's tensors as in files that are served; newer transformers leave a part out."""
    stored = load_file(file)
    names = {name: name.replace("vision_tower.", f"{_OF_CLIP}.") for name in stored}
    save_file({names[name]: tensor for name, tensor in stored.items()}, file, {"format": "pt"})


def side_files(model: Path) -> list[Path]:
    """List the files of a model beside its config and its weights."""
    return [
        file
        for file in sorted(model.iterdir())
        if file.name != "config.json" and file.suffix in (".json", ".jinja")
    ]


def finish(folder: Path, model: Path) -> Path:
    """Give a checkpoint that was made of a model the model's other files."""
    for file in side_files(model):
        shutil.copyfile(file, folder / file.name)
    return folder


def chat_template(image: str) -> str:
    """Write texts as they are, and an image as its tokens."""
    return (
        "{% for message in messages %}{% if message.content is string %}{{ message.content }}"
        "{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
        f"{{% else %}}{image}{{% endif %}}{{% endfor %}}{{% endif %}}{{% endfor %}}"
    )


def picture(seed: int = 0) -> Image.Image:
    """Draw 56 x 84 pixels: squares of random colours."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.randint(256, (4, 6, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(squares.numpy()).resize((84, 56), Image.Resampling.NEAREST)


class FloatModel:
    """A model in transformers, in float32. `no_videos` must be in use."""

    def __init__(self, name: str, folder: Path) -> None:
        kind = getattr(transformers, f"{name.partition(',')[0]}ForConditionalGeneration")
        self.model = kind.from_pretrained(folder, dtype=torch.float32).eval()
        names = layer_names(language_config(Checkpoint.open(folder).config))
        self._names = replace(names, blocks="model.language_model.layers")
        use_linear_experts(self.model, self._names)
        processor = MODELS[name]["files"]["preprocessor_config.json"]["processor_class"]
        self._processor = getattr(transformers, processor).from_pretrained(folder)

    @torch.no_grad()
    def logits(self, prompt: str, image: Image.Image | None = None) -> torch.Tensor:
        """Compute the logits [tokens, vocabulary] of a prompt with an image or `picture`."""
        images = [image or picture()]
        inputs = self._processor(text=[prompt], images=images, return_tensors="pt")
        return self.model(**inputs).logits[0]

    def logits_of(self, weights: StoredSet, prompt: str) -> torch.Tensor:
        """Compute them with the weights of a set, and inputs of linear layers in int8."""
        view, whole = FloatView(language_set(weights)), weights.checkpoint
        state = {whole_name(one): view.get(one).float() for one in view.tensors}
        for one in whole.tensors:
            if language_name(one) is None:
                place = one.removeprefix("model.").replace(_OF_CLIP, "vision_tower")
                state[f"model.{place}"] = whole.get(one).float()
        self.model.load_state_dict(state)
        with int8_inputs(linears(self.model, self._names)):
            return self.logits(prompt)
