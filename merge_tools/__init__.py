"""Merge finished quantized checkpoints of one model into one.

`python -m merge_tools merge|inspect|verify` or `vllm-qoq merge`; from Python `vllm_qoq.merge`.
Needs torch and safetensors; neither vLLM nor llmcompressor.

The way of a merge, a module each:

    sources     open the folders, one per set
    unused      leave out what the model does not use
    compatible  same model? same tokenizer? same tensors? (meaning: of two configs)
    survey      which tensors are equal, by content
    norms       norms that differ, and the layers that make up for it
    nest        an 8-bit set as a residual on a QoQ set
    plan        what the output will contain: pure, printable
    kv_basis    can the sets share one KV cache?
    execute     the checkpoint, tensor by tensor
    job         all of this, from start to end

Reading, checking and writing checkpoints is the business of `vllm_qoq.checkpoint`.
"""

from vllm_qoq.errors import UserError


class MergeError(UserError):
    """A merge that cannot be done as asked. The message says why, and what to do instead."""
