"""The perplexity of a checkpoint on a text, through vLLM: `vllm-qoq perplexity`.

In this protocol the text is tokenized once, without special tokens, and cut into
consecutive windows of `seqlen` tokens; the rest is dropped. Every token of a
window but the first is scored given the tokens before it in the window.
Perplexity is exp of the mean negative log-likelihood over all scored tokens,
so it is per token of the model's own tokenizer. A window is one prompt, which runs
in the prefill set unless a set is forced, and in that of a calm engine where the
routing has a `load`.

With a quantized KV cache, a window that fits in one step reads its own tokens unquantized, so the
result says nothing of the cache (`vllm_qoq.numerics.reference_attention`). `--chunk N` runs one
window at a time, N tokens a step; all but those N are read from the cache.

On x86 CPUs without AVX512_BF16, vLLM's attention, RoPE, W8A8 and W4A16 kernels truncate
float32 to bf16 (csrc/cpu/cpu_types_x86.hpp), which makes their outputs 0.3 to 0.4 %
smaller and lowers the perplexity of the test model by 0.1 to 0.5 %. To fp16 they round.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.config.model import ModelDType

from vllm_qoq.checkpoint import hub
from vllm_qoq.checkpoint.format import QUANT_METHOD
from vllm_qoq.checkpoint.kv_config import Bits
from vllm_qoq.errors import FormatError, UserError, reason
from vllm_qoq.serving.kv.cache import describe
from vllm_qoq.serving.options import NAMESPACE
from vllm_qoq.serving.plugin.config import QoQConfig


def perplexity(
    checkpoint: str | Path,
    text: str | Path,
    *,
    force_set: str | None = None,
    seqlen: int = 2048,
    chunk: int | None = None,
    kv_bits: Bits | None = None,
    dtype: ModelDType = "auto",
    enforce_eager: bool = False,
    gpu_memory_utilization: float | None = None,
) -> dict[str, Any]:
    """Measure the perplexity of a checkpoint on a text, through vLLM in this process.

    checkpoint     folder of any checkpoint that vLLM serves, or its id on the Hub, which vLLM
                   downloads: ORG/NAME or ORG/NAME@REVISION
    text           file to score, in UTF-8
    force_set      run everything in one set
    seqlen         tokens of a window
    chunk          run each window so many tokens a step, so that it reads the rest from the cache
    kv_bits        bits of the KV cache; by default the checkpoint's
    dtype          the dtype that vLLM runs the model in, as its --dtype
    enforce_eager  start faster, run slower
    gpu_memory_utilization  share of the memory that vLLM may take, above 0 to 1; by default vLLM's

    Raises UserError where vLLM does not start, and for a text that is shorter than a window.
    """
    options: dict[str, Any] = {"kv_bits": kv_bits, "force_set": force_set}
    if force_set is None:
        options["force_load"] = "calm"
    options = {key: value for key, value in options.items() if value is not None}
    model, engine = str(checkpoint), dict[str, Any]()
    wanted = hub.HubId.parse(checkpoint) if hub.is_to_download(checkpoint) else None
    if wanted is not None and wanted.revision is not None:
        model, revision = wanted.repository, wanted.revision
        engine = {"revision": revision, "tokenizer_revision": revision}
    if gpu_memory_utilization is not None:
        engine["gpu_memory_utilization"] = gpu_memory_utilization
    if chunk is not None:
        engine |= {"max_num_batched_tokens": chunk, "max_num_seqs": 1}
    if kv_bits is not None:
        engine["quantization"] = QUANT_METHOD  # also where the model has no section of ours
    try:
        llm = LLM(
            model,
            max_model_len=seqlen + 1,
            additional_config={NAMESPACE: options},
            enable_prefix_caching=False,
            enforce_eager=enforce_eager,
            dtype=dtype,
            trust_remote_code=False,
            disable_log_stats=True,
            **engine,
        )
    except UserError:
        raise
    except Exception as error:  # vLLM raises its own and pydantic's, or its process died
        raise UserError(
            f"{checkpoint}: vLLM did not start: {reason(error)}; its log above says more, "
            "--debug shows where"
        ) from error
    return text_perplexity(llm, Path(text).read_text(encoding="utf-8"), seqlen) | {
        "checkpoint": str(checkpoint),
        "text": str(text),
        "set": force_set,
        "kv_cache": _kv_cache(llm.llm_engine.vllm_config),
        "chunk": chunk,
    }


def text_perplexity(llm: LLM, text: str, seqlen: int) -> dict[str, Any]:
    """Measure the perplexity of `text` in windows of `seqlen` tokens, as the module describes."""
    tokens = llm.get_tokenizer().encode(text, add_special_tokens=False)
    windows = [tokens[i : i + seqlen] for i in range(0, len(tokens) - seqlen + 1, seqlen)]
    if not windows or seqlen < 2:
        raise FormatError(
            f"the text has {len(tokens)} tokens, fewer than one window of {seqlen}; "
            "give a longer text or a smaller --seqlen (at least 2)"
        )
    outputs = llm.generate(
        [{"prompt_token_ids": window} for window in windows],
        # With 0, vLLM gives the log-probability of the prompt's own tokens and no others.
        SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False),
    )
    losses = [
        -candidates[token].logprob
        for window, output in zip(windows, outputs, strict=True)
        for token, candidates in zip(window[1:], output.prompt_logprobs[1:], strict=True)
    ]
    return {
        "perplexity": math.exp(math.fsum(losses) / len(losses)),
        "scored_tokens": len(losses),
        "windows": len(windows),
        "seqlen": seqlen,
    }


def _kv_cache(vllm_config: VllmConfig) -> str:
    config = vllm_config.quant_config
    own = config.checkpoint_kv_cache if isinstance(config, QoQConfig) else None
    return describe(own, vllm_config)
