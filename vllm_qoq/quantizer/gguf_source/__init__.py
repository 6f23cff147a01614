"""Models in GGUF, the format of llama.cpp, as the input of `quantize`.

header     what a file says of itself, read within bounds
sizes      the sizes that its keys say, held against its tensors
rope       RoPE scaling, which transformers does not read from GGUF
tokenizer  the tokenizer of a file
convert    a folder of Hugging Face made of a file, once
"""
