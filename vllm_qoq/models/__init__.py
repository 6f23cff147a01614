"""The language models that the tools know: one table, and what follows from it.

table    an entry for every architecture
tensors  every tensor that a model has, with its shape, from its `config.json`
linears  its linear layers and its other tensors, apart
names    names of layers: decoder blocks, fused projections, globs
"""
