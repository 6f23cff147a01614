"""Checkpoints of QServe and deepcompressor, read into ours: `vllm-qoq import`.

The way of an import, a module each:

    source          open the folder: safetensors, or pickles that hold tensors only
    expected        what the base model's config says must be there
    detect          which format it is, by tensor names; every name, dtype and shape
    qserve          read a packed checkpoint (tiles: its layout, level2: its second level)
    deepcompressor  read raw outputs: the weights and scales before packing
    values          numbers that cannot be
    imported        the result as a set of our format, computed tensor by tensor
    write           stream it out, verify, rename

Needs torch and safetensors; neither vLLM nor llmcompressor.
"""
