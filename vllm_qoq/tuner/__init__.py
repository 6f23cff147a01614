"""Tune the routing of a checkpoint to this machine by measuring every set: `vllm-qoq tune`.

A module for each step:

    target        opens the checkpoint, and writes the routing into its config.json
    accuracy      orders the sets by accuracy, as far as their bits tell
    device        names what this machine measures on, and checks that it can
    engine        what a running engine has to measure
    vllm_engine   such an engine in vLLM
    vllm_worker   one of its ranks, which measures; these two alone import vLLM
    measure       measures all layers of all sets over all numbers of tokens, and whole steps
    measurements  what was measured, and what follows for a step
    memory        keeps measurements in qoq_tune.json for the next run
    preferences   how much time accuracy is worth
    choose        chooses a routing from measurements, as a pure function
    keep          layer rules that keep decoder layers in the most accurate set
    job           does all of this, from start to end
    report        the result as text and as JSON
    plot          the result as a picture
"""

from vllm_qoq.errors import UserError


class TuneError(UserError):
    """A checkpoint that cannot be tuned as asked; the message has the remedy."""
