"""The ops `qoq::*` that models run through: their schemas, fakes, CPU implementations and kernels.

    library      defines an op, loads the CUDA kernels and says whether they run here
    linear_ops   quantizing activations, and the GEMM over QoQ weights
    expert_ops   the rows of a mixture of experts, and the GEMM over them
    kv_ops       writing and reading the quantized KV cache
    checks       what the ops refuse, in the words of the kernels
    w4a8_layout  the packed form of weights that the GEMM reads

Importing the package defines every op, also where there are no kernels. What an op computes is in
`vllm_qoq.numerics`.
"""

from vllm_qoq.ops import expert_ops as expert_ops
from vllm_qoq.ops import kv_ops as kv_ops
from vllm_qoq.ops import linear_ops as linear_ops
from vllm_qoq.ops.library import has_kernels as has_kernels
from vllm_qoq.ops.library import is_built as is_built
from vllm_qoq.ops.library import missing_kernels as missing_kernels
from vllm_qoq.ops.library import missing_ops as missing_ops
