"""Prompts over a quantized history on a GPU: FlashAttention, beside the reference."""

from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from gpu_room import skip_without_room

from vllm_qoq import ops
from vllm_qoq.numerics import kv_layout, reference_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ops.has_kernels("cuda"), reason="this build has no CUDA kernels (VLLM_QOQ_CUDA=1)"
    ),
]

DEVICE = torch.device("cuda")
HEADS, KV_HEADS, BLOCK, BITS = 8, 2, 64, 8
# (tokens in the cache, new tokens): generation, then prompts whole, in pieces, behind prefixes
REQUESTS = [(500, 1), (70, 1), (0, 300), (1000, 40), (64, 64), (3, 2)]
VERIFYING = [(500, 4), (70, 1), (30, 3), (0, 300), (1000, 40), (64, 64)]


# Where heads are large, FlashAttention 3 is right about windows of whole tiles.
WINDOWS = [(size, w) for size in kv_layout.HEAD_SIZES for w in (None, 128 if size == 256 else 100)]


@pytest.mark.parametrize("head_size, window", WINDOWS)
@pytest.mark.parametrize("kind", ["plain", "capped", "sinks", "capped sinks"])
@pytest.mark.parametrize("requests, most", [(REQUESTS, 1), (VERIFYING, 4)], ids=["", "verifying"])
def test_a_step_is_the_reference(head_size, window, kind, requests, most):
    skip_without_room(head_size, BITS, HEADS // KV_HEADS, most)
    from vllm_qoq.serving.kv.cuda import CUDAKVMetadata, CUDAQuantizedKVImpl
    from vllm_qoq.serving.kv.prefill import plan_prefill

    torch.manual_seed(0)
    soft_cap = 1.0 if "capped" in kind else 0.0
    sinks = torch.linspace(-5, 8, HEADS).bfloat16() if "sinks" in kind else None
    impl = CUDAQuantizedKVImpl(
        *(HEADS, head_size, head_size**-0.5, KV_HEADS),
        sliding_window=window,
        bits=BITS,
        use_hadamard=False,
        soft_cap=soft_cap,
        sinks=None if sinks is None else sinks.to(DEVICE),
        max_new_tokens=512,
        max_query_len=most,
    )
    new = [count for _, count in requests]
    lengths = [sum(pair) for pair in requests]
    blocks = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(blocks)).int().split(blocks)
    table = torch.zeros(len(requests), max(blocks), dtype=torch.int32)
    slot_bytes = kv_layout.slot_bytes(head_size, BITS)
    pages = torch.zeros(sum(blocks), KV_HEADS, BLOCK * slot_bytes, dtype=torch.uint8)
    fresh, slots = [], []
    for request, (length, mine) in enumerate(zip(lengths, order, strict=True)):
        table[request, : len(mine)] = mine
        both = torch.randn(2, length, KV_HEADS, head_size).bfloat16()
        position = torch.arange(length)
        slot = mine[position // BLOCK].long() * BLOCK + position % BLOCK
        reference_attention.update(pages, *both, slot, BITS)
        fresh.append(both[:, -new[request] :])
        slots.append(slot[-new[request] :])
    key, value = torch.cat(fresh, dim=1)
    query = torch.randn(sum(new), HEADS, head_size).bfloat16()
    starts = [0, *accumulate(new)]
    expected = reference_attention.attention(
        *(query, key, value, pages, table, torch.tensor(lengths), torch.tensor(starts)),
        scale=impl.scale,
        bits=BITS,
        most_decode_tokens=most,
        sliding_window=window,
        soft_cap=soft_cap,
        sinks=sinks,
    )
    decodes = sum(count <= most for count in new)
    prompts = [start - starts[decodes] for start in starts[decodes:]]
    history = [past for past, _ in requests[decodes:]]
    metadata = CUDAKVMetadata(
        num_actual_tokens=sum(new),
        max_query_len=max(new),
        max_seq_len=max(lengths),
        query_start_loc=torch.tensor(starts).int().to(DEVICE),
        seq_lens=torch.tensor(lengths).int().to(DEVICE),
        block_table=table.to(DEVICE),
        slot_mapping=torch.cat(slots).to(DEVICE),
        most_decode_tokens=most,
        num_decodes=decodes,
        decode_tokens=starts[decodes],
        query_len=max(new[:decodes]),
        prefill=plan_prefill(prompts, history, window, 700, DEVICE),
    )
    out = torch.zeros(sum(new), HEADS * head_size, dtype=torch.bfloat16, device=DEVICE)
    cache = pages.view(-1, KV_HEADS, BLOCK, slot_bytes).to(DEVICE)
    impl.attend(*(x.to(DEVICE) for x in (query, key, value)), cache, metadata, out, None)
    error = (out.cpu().float().view(expected.shape) - expected).norm(dim=-1)
    # Some roundings to bf16: of what is read back, of the weights, of each part's result.
    assert (error <= 0.015 * expected.norm(dim=-1) + 0.002).all(), error.max()


@pytest.mark.parametrize("window, is_served", [(100, False), (128, True), (None, True)])
def test_windows_that_flash_attention_gets_wrong_are_refused(window, is_served):
    from vllm_qoq.serving.kv.cuda import CUDAKV8Backend, _flash_version

    if _flash_version(256, None) != 3:
        pytest.skip("FlashAttention 3 alone is wrong about them")
    layer = SimpleNamespace(
        num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=256, has_sink=False, sliding_window=window
    )
    said = list(CUDAKV8Backend.obstacles(layer, torch.bfloat16, 1))
    assert is_served == (not said)
    assert is_served or "a window of 100 tokens" in said[0]
