"""`vllm-qoq quantize`: one float model in, one checkpoint with all sets out.

    architectures  which layers read which norm, by model type
    rotate         norms folded, R1 on the residual stream, R2 on V and O
    observe        what is gathered of a block: samples, magnitudes
    strength       the scales for which rounding costs least
    smooth         SmoothAttention on K, smoothing and order of block outputs
    grid           the grids that weights are rounded to
    nested         the grid of an 8-bit set that is a residual on a 4-bit one
    gptq           rounding column by column, with what is known of the inputs
    sets           what a set stores of a layer, and its entry in config.json
    modifiers      the two passes over the calibration text, in llmcompressor's pipeline
    workdir        results per layer on the disk, so that a stopped run goes on
    inputs         what config, headers and texts must say, without an import
    load           model and tokenizer, from checked files alone
    plan, size, estimate what is known beforehand
    keys           biases of K that a quantized cache cannot hold
    job, assemble  the run from start to end, and the checkpoint at its end
    evaluate, check  perplexity and text of the float model and of every set
    report, cli, noise what the user sees

Each step preserves the function of the float model until `grid` rounds it.
llmcompressor is imported by `modifiers` and `job` only; vLLM never.
"""

from vllm_qoq.errors import UserError


class QuantizeError(UserError):
    """A model, text or option that cannot be quantized with. The message has the remedy."""
