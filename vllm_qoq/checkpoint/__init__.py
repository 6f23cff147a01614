"""Checkpoints on the disk: what they hold, reading and checking them, writing them.

The contract:

    format           what `config.json` says and how tensors are named
    kv_config        the part of it about the KV cache

Reading folders that nobody vouches for:

    folder           opens a Hugging Face folder
    stored_set       one quantized version of the model in it
    layout           how a quantization method stores a layer
    methods          what the config of a method says of a layer, as vLLM reads it
    patterns         regular expressions of strangers, matched in bounded time
    dequantize       rows of a weight, whatever the method
    language         the language model in a checkpoint, which may have more
    stacked_experts  experts that are stored as one tensor, as layers of their own
    float_view       a set as the model in floating point that it computes

Checking:

    verify           runs all the checks that follow
    complete         no tensor is lost, and each has the right dtype and shape
    sizes            every size is as `config.json` says
    constants        the other numbers of `config.json` can be
    values           numbers are finite and scales positive
    served           config and tensors agree as vLLM reads them
    layer_rules      the layer rules of the routing match layers
    stream           the basis of the residual stream is sound
    towers           what is beside a language model is as `config.json` says
    k_mean           the means of K that are announced are there
    inspect          what is in a checkpoint
    tensor_parallel  over how many GPUs a checkpoint can be split

Writing:

    output           where an output may go, and whether it fits
    replace          writes a folder whole or not at all, and replaces only what is ours
    ours             what in a folder is ours
    output_config    the `config.json` of an output
    shards           which tensor goes into which file, and the whole checkpoint
    writer           writes files that are complete and on the disk
    card             the model card
"""
