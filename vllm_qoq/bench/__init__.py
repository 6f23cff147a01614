"""Benchmarks: our kernels and whole engines beside what vLLM offers, and perplexity.

The command `vllm-qoq bench gemm` measures all kernels in one run on one GPU:

    cases         kernels, layers and numbers of tokens; the tests of the kernels use them, too
    peers         every kernel but humming's, from random weights to calls
    humming_peer  humming's kernels, which it compiles itself
    measure       measures all kernels over all cases
    attempts      keeps why a kernel is missing
    roofline      the floor that no kernel undercuts
    result        what was measured, and what follows from it
    report        the result as Markdown
    plot          the result as a picture

The command `vllm-qoq bench attention` has modules of its own: attention_cases,
attention_kernels, attention_measure, attention_result, attention_report and attention_plot.

The commands `vllm-qoq bench serving` and `bench table` are the package serving, and
`vllm-qoq perplexity` is in perplexity. `vllm-qoq evaluate` is the package evaluate.

`vllm_qoq.measuring` times the calls. Only `peers`, inside functions, `serving.engine`,
`evaluate.engine` and `perplexity` import vLLM.
"""

from vllm_qoq.errors import UserError


class BenchError(UserError):
    """A benchmark that cannot run as asked; the message has the remedy."""
