"""Which of vLLM's kernels this machine's processor has; tests of the others are skipped by name."""

import platform

import pytest
import torch
import vllm._custom_ops  # noqa: F401  (loads the library for this processor)

_HAS_GPU = torch.cuda.is_available()
_IS_X86 = platform.machine() == "x86_64"

HAS_WNA16 = _HAS_GPU or hasattr(torch.ops._C, "cpu_gemm_wna16")

needs_wna16 = pytest.mark.skipif(
    not HAS_WNA16, reason="vLLM has no kernel for 4-bit weights on this processor (no AVX-512)"
)
needs_exact_int8 = pytest.mark.skipif(
    not _HAS_GPU and _IS_X86 and not torch.cpu._is_vnni_supported(),
    reason="vLLM's int8 kernel adds pairs in 16 bits on this processor (no VNNI): sums are cut off",
)
