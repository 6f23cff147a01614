"""Import checkpoints of QServe and deepcompressor into ours: `vllm-qoq import`.

A module for each step:

    inputs          checks what can be checked before torch is imported
    source          opens the folder: safetensors, or pickles that hold tensors only
    detect          finds the format by tensor names, and checks every name, dtype and shape
    qserve          reads a packed checkpoint
    tiles           undoes the memory order of QServe's kernel
    level2          converts the second level of a checkpoint in groups
    deepcompressor  reads raw outputs: the weights and scales before packing
    values          checks numbers
    imported        the result as a set of our format, computed tensor by tensor
    job             does all of this, from start to end

The package needs torch and safetensors, but neither vLLM nor llmcompressor.
"""
