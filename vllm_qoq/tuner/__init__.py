"""`vllm-qoq tune`: measure every set of a checkpoint on this machine, write the best routing.

target        the checkpoint: refused before work begins, or its config.json rewritten
accuracy      which set is more accurate, by the bits of its numbers
engine        what a running engine has to measure
measure       all layers of all sets over all numbers of tokens, and whole steps
measurements  what was measured, and what follows for a step
preferences   how much time accuracy is worth
choose        from there to a routing: a pure function
memory        qoq_tune.json: measurements are kept for the next run
device        what this machine is called there
job           one run, from the target to the result
report, plot  tune.json, tune.md and tune.png
vllm_engine   such an engine in vLLM; the only module that imports it
"""

from vllm_qoq.errors import UserError


class TuneError(UserError):
    """A checkpoint that cannot be tuned as asked. The message has the remedy."""
