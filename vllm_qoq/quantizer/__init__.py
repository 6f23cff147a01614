"""Quantize a float model into one checkpoint with all sets: `vllm-qoq quantize`.

Before the work:

    options    the options of a quantization
    effort     names for several of them, by the time that a run may take
    inputs     checks of config, headers and texts that need no slow import
    gguf_source  makes a folder of Hugging Face of a model in GGUF
    model      layer names, dimensions and blocks of the model
    experts    mixtures of experts as modules with a layer for each projection
    parts      finds the rows of q, k and v in a layer that does the work of several
    rope       finds which channels of a head turn together, and how fast
    load       loads model and tokenizer, from checked files alone
    text       cuts a text into pieces
    size       how much disk and memory a run takes
    estimate   how long it takes
    plan       puts all of this together

Transforming, which preserves the function of the float model:

    rotate     folds the norms, rotates the residual stream (R1), V and O (R2)
    observe    gathers samples and magnitudes of a block
    strength   finds the scales for which rounding costs least
    k_mean     the mean of K after RoPE, which the cache leaves out
    smooth     SmoothAttention on K, scales and order of the inputs of o_proj and down_proj
    towers     rotates what a vision tower writes into the stream
    changes    says how the weights were transformed, for LoRA adapters
    keys       finds biases of K that a quantized cache cannot hold

Rounding:

    hessian    what calibration shows of the inputs of layers, and its factors
    grid       the grids that weights are rounded to
    nested     the grid of an 8-bit set that is a residual on a 4-bit one
    gptq       rounds block of columns by block, with what is known of the inputs
    rounding   the loops inside a block, in PyTorch (`rounding_plain`) and in Triton
               (`rounding_triton`)
    matmul     products of float32 matrices on tensor cores
    layers     rounds the layers with one input in every set
    sets       the grid of each set, and its entry in config.json
    head       the int8 lm_head

The run:

    modifiers  the two passes over the calibration text, in llmcompressor's pipeline
    attention  attention of the passes on a CPU, in one operation
    products   products of 16-bit floats on CPUs that have no instructions for them
    weights    changes a parameter, wherever the pipeline keeps it
    workdir    keeps the results of each block on the disk, so that a stopped run goes on
    writer     writes the results of a block while the next one is computed
    pipeline   llmcompressor's pipeline itself
    job        does all of this, from start to end
    calibrate_kv  measures the mean of K alone, for a model that stays as it is
    assemble   the contents of the checkpoint
    evaluate   measures perplexity in transformers
    check      measures the float model and every set
    report     the report
    worst      the decoder layers that lose most, and what keeps them accurate
    noise      silences what libraries print

llmcompressor is imported by `modifiers`, `pipeline` and `noise` only; vLLM never.
"""

from vllm_qoq.errors import UserError


class QuantizeError(UserError):
    """A model, text or option that cannot be quantized with; the message has the remedy."""
