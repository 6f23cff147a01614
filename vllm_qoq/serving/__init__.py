"""The adapter between vllm-qoq and vLLM: all that imports vLLM, but for the peers of `bench`.

register.py    what the entry point does, in every process of vLLM
front_end.py   what is refused before an engine starts, and who gets a stat logger
stat_logger_plugin.py  the stat logger's entry point, for models of ours alone
config.py      QoQConfig: the quantization method `qoq` in vLLM's words
policy.py      the routing in force in one engine, and what the user overrides
linear.py      one linear layer that holds several sets
weight_set.py  one set's weights of one linear layer, and the proof that they were loaded
flex_op.py     `qoq::flex_linear`, the op in which the set is chosen
step.py        prefill or decode: reading vLLM's forward context
trace.py       routing decisions as lines of JSON
shared_files.py  files in shared memory, and who removes them
counters.py    steps by phase and set, in memory shared with the front end
load.py        calm or busy, in memory shared with the front end
metrics.py     both in vLLM's log and Prometheus endpoint, and the bits of the KV cache
hidden_states.py  the way back from a rotated stream, where hidden states leave the model
models.py      FlexQuant* model classes for architectures with a loader of their own
compat.py      every branch on a vLLM version
perplexity.py  `vllm-qoq perplexity`
"""
