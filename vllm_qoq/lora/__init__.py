"""LoRA adapters of a model in the basis of the checkpoint that `quantize` made of it."""
