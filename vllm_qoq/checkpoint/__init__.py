"""Checkpoints on the disk: what they hold, reading and checking them, writing them.

The contract

    format, kv_config  what `config.json` says and how tensors are named

Reading what nobody vouches for

    folder      opens a Hugging Face folder
    stored_set  one quantized version of the model in it
    layout      how a quantization method stores a layer
    methods     what a method's config says of a layer, as vLLM reads it
    patterns    regular expressions of strangers, in bounded time
    dequantize  rows of a weight, whatever the method

Checking

    verify       all of what follows
    complete     no tensor lost, each of the right dtype and shape
    sizes        every size as `config.json` says
    constants    its other numbers
    values       numbers finite, scales positive
    served       config and tensors agree as vLLM reads them
    layer_rules  rules of the routing match layers
    stream       the basis of the residual stream
    inspect, tensor_parallel  what is in a checkpoint, and between how many GPUs it can be split

Writing

    output   where an output may go, and whether it fits
    replace  a folder appears whole or not at all; an older one is deleted only if it is ours
    ours     what of a folder is ours
    shards   which tensor goes into which file, and the whole checkpoint
    writer   files that are complete and on the disk
    card     the model card
"""
