"""`vllm-qoq bench`: our kernels beside what vLLM offers, in one run on one GPU.

    cases        kernels, layers and numbers of tokens; the tests of the kernels use them, too
    peers        every kernel but humming's, from random weights to calls
    humming_peer humming's, which compiles its kernels itself
    timing       seconds of a call, in CUDA graphs
    measure      all kernels over all cases
    attempts     why one is missing
    roofline     the floor that no kernel undercuts
    result       what was measured, and what follows from it
    report, plot gemm.json, gemm.md and gemm.png
    progress, command, cli  what the user sees

`bench attention` has attention_cases, _kernels, _measure, _result, _report and _plot of its own.

Only `peers` imports vLLM, and only inside functions.
"""

from vllm_qoq.errors import UserError


class BenchError(UserError):
    """A benchmark that cannot run as asked. The message has the remedy."""
