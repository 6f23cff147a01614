"""LoRA adapters that a server is started with: whether they are in the basis of its checkpoint.

vLLM has no hook where it loads an adapter. Those that it is told of while it runs, and those of
requests of `LLM()`, are not looked at.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from vllm.config import ModelConfig, VllmConfig

from vllm_qoq.checkpoint import adapter_mark, hub, transforms
from vllm_qoq.errors import FormatError, UserError, shown
from vllm_qoq.serving.options import Options
from vllm_qoq.serving.plugin.adapters import TRAINED


def check_named_adapters(adapters: Mapping[str, str], vllm_config: VllmConfig) -> None:
    """Raise UserError for an adapter in another basis than the checkpoint, as far as it is marked.

    adapters  name -> folder, or id on the Hub

    What has no config is left to vLLM.
    """
    if not adapters or vllm_config.lora_config is None:
        return
    option, model = Options.of(vllm_config).lora, vllm_config.model_config
    basis = _basis(model)
    for name, path in adapters.items():
        config = _config(path)
        if config is None:
            continue
        try:
            mark = adapter_mark.of_folder(config.parent)
        except FormatError as error:
            raise UserError(f"LoRA adapter {name}={path}: {error}") from None
        if mark is None:
            problem = _of_unmarked(path, model, basis) if option == "converted" else None
        else:
            problem = _of_marked(mark, model, basis)
        if problem is not None:
            raise UserError(f"LoRA adapter {name}={path}: {problem}")


def _of_unmarked(path: str, model: ModelConfig, basis: str | None) -> str:
    if basis is None:
        problem = (
            f"was not converted, and without a {transforms.FILE} of this checkpoint none can be; "
            "merge it into the model before quantizing"
        )
    else:
        problem = (
            f"was not converted; do so with `vllm-qoq convert-lora {path} {model.model} -o "
            "CONVERTED`, and serve CONVERTED"
        )
    return (
        f"{problem}, or, if it was trained on the weights of this checkpoint, start with {TRAINED}"
    )


def _of_marked(mark: adapter_mark.Mark, model: ModelConfig, basis: str | None) -> str | None:
    if mark.basis == basis:
        return None
    name, other = shown(mark.converted_for), shown(mark.basis)
    problem = f"was converted for {name}, in the basis {other}, and this checkpoint "
    if basis is None:
        return f"{problem}has no {transforms.FILE}; serve the adapter as it was trained"
    return (
        f"{problem}is in the basis {basis!r}; convert the adapter that was trained, with `vllm-qoq "
        f"convert-lora ADAPTER {model.model} -o CONVERTED`"
    )


def _basis(model: ModelConfig) -> str | None:
    """Find the digest of a checkpoint's transforms; None where it has none."""
    folder = Path(model.model)
    file: Path | None = folder / transforms.FILE
    if not folder.is_dir():
        file = hub.one_file(model.model, model.revision, transforms.FILE)
    return transforms.digest(file) if file is not None and file.is_file() else None


def _config(path: str) -> Path | None:
    """Find the config of an adapter where vLLM would look for it, or on the Hub."""
    folder = Path(os.path.expanduser(path) if path.startswith("~") else path)
    if folder.is_dir():
        config = folder / adapter_mark.CONFIG
        return config if config.is_file() else None
    return hub.one_file(path, None, adapter_mark.CONFIG) if hub.is_to_download(path) else None
