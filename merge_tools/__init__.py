"""Merge finished quantized checkpoints of one model into one.

`python -m merge_tools merge|inspect|verify` or `vllm-qoq merge`; from Python `vllm_qoq.merge`.
The package needs torch and safetensors, but neither vLLM nor llmcompressor. A module for each step:

    sources     opens the folders, one per set
    unused      leaves out what the model does not use
    compatible  checks that all inputs are one model: config, tokenizer, layers
    meaning     brings a config into one spelling, so that two can be compared
    survey      finds which tensors are equal, by content
    norms       finds the layers that make up for norms that differ
    nest        makes an 8-bit set a residual on a QoQ set
    plan        works out what the output will contain, without touching a file
    kv_basis    checks that the sets can share one KV cache
    execute     writes the checkpoint, tensor by tensor
    job         does all of this, from start to end

Reading, checking and writing checkpoints is the business of `vllm_qoq.checkpoint`.
"""

from vllm_qoq.errors import UserError


class MergeError(UserError):
    """A merge that cannot be done as asked. The message says why, and what to do instead."""
