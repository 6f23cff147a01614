"""The language models that the tools know: one table, and what follows from it.

table     an entry for every architecture
blocks    the layers of a decoder block, by what they do
tensors   every tensor that a model has, with its shape, from its `config.json`
linears   its linear layers, apart from its other tensors
mixtures  its layers by what they do, experts among them
vision    models of images and text, by the language model that is in one
config    the parts of a `config.json` that the tools read
names     names of layers: decoder blocks, fused projections, globs
"""
