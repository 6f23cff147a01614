"""Merge finished quantized checkpoints into one, look into the result and verify it.

`python -m merge_tools merge|inspect|verify` or `vllm-qoq merge|inspect|verify`.
Needs torch and safetensors; neither vLLM nor llmcompressor.

The way of a merge, a module each:

    sources      open the folders, one per set
    compatible   same model? same tokenizer? same tensors?
    complete     no tensor lost, every one of the right dtype and shape (layout)
    sizes        every tensor as config.json says, by the table of all tensors (expected)
    survey       which tensors are equal, by content
    plan         what the output will contain: pure, printable
    values       numbers finite, scales positive
    kv_basis     can the sets share one KV cache?
    nest         an 8-bit set as a residual on a QoQ set
    execute      stream the tensors out, verify
    replace      rename; an older output only if it is ours
"""

from vllm_qoq.errors import UserError


class MergeError(UserError):
    """A merge that cannot be done as asked. The message says why, and what to do instead."""
