"""The choice of the set that a step runs in, as pure functions that know nothing of vLLM.

table       the routing table of a checkpoint: which set a layer uses in a step
hysteresis  the switch that says when an engine is busy
"""
