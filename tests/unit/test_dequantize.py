"""Layers packed here, by the definitions of their formats, dequantize to the exact weight.

Codes, zero points and scales are drawn first. A weight computed from them in float64
is the oracle: codes of 8 bits times scales of fp16 fit into a float32 without rounding.
The packers work word by word in Python integers, unlike the code under test. Definitions:
`pack_rows` and `awq_pack` of vLLM's quant_utils.py, the kernel of its awq_triton.py,
compressed-tensors' `pack_to_int32`, OCP's 8-bit floating point specification.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from vllm_qoq.checkpoint import dequantize as module
from vllm_qoq.checkpoint.dequantize import dequantize, row_chunks
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.checkpoint.stored_set import StoredSet

N, K, GROUP = 72, 256, 64
LAYER = "model.layers.0.mlp.up_proj"
# awq_triton.py: column c of eight is in nibble AWQ_NIBBLE[c] of its word.
AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)


@pytest.fixture
def random():
    return torch.Generator().manual_seed(7)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Three chunks, the last of them ragged: 32, 32 and 8 rows."""
    monkeypatch.setattr(module, "_CHUNK_VALUES", 32 * K)


def whole(folder, tensors, config):
    """Store a layer with these leaves, then dequantize it chunk by chunk: float32 [N, K]."""
    save_file({f"{LAYER}.{leaf}": t for leaf, t in tensors.items()}, folder / "a.safetensors")
    (folder / "config.json").write_text(json.dumps({}))
    checkpoint = Checkpoint.open(folder)
    weights = StoredSet("a", checkpoint, config, checkpoint.tensors)
    chunks = list(row_chunks(weights.describe(LAYER)))
    assert len(chunks) == 3
    return torch.cat([dequantize(weights, LAYER, rows) for rows in chunks])


def draw(random, bits, groups=K // GROUP):
    """codes [N, K], zero points [N, groups] (1 and up: version 1 of GPTQ), scales fp16."""
    codes = torch.randint(0, 1 << bits, (N, K), generator=random)
    zeros = torch.randint(1, 1 << bits, (N, groups), generator=random)
    scales = (torch.rand(N, groups, generator=random) + 0.01).half()
    return codes, zeros, scales


def weight(codes, zeros, scales, group):
    exact = (codes - zeros[:, group]).double() * scales[:, group].double()
    assert torch.equal(exact.float().double(), exact)
    return exact.float()


def pack_rows_of(matrix, bits, places=None):
    """Pack along the last dimension: the value i of a word at `places[i]`, else i."""
    count = 32 // bits
    places = places or range(count)
    rows = []
    for row in matrix.tolist():
        words = []
        for start in range(0, len(row), count):
            part = row[start : start + count]
            word = sum(value << (bits * place) for value, place in zip(part, places, strict=False))
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("order", ["groups in order", "desc_act"])
@pytest.mark.parametrize(("version", "less"), [("gptq", 1), ("gptq_v2", 0)])
def test_gptq(tmp_path, random, bits, order, version, less):
    """qweight packs inputs, qzeros outputs; version 1 stores each zero point less one."""
    codes, zeros, scales = draw(random, bits)
    group = torch.arange(K) // GROUP
    if order == "desc_act":
        group = group[torch.randperm(K, generator=random)]
    tensors = {
        "qweight": pack_rows_of(codes, bits).T.contiguous(),
        "qzeros": pack_rows_of(zeros.T - less, bits),
        "scales": scales.T.contiguous(),
        "g_idx": group.int(),
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP}
    config["checkpoint_format"] = version
    got = whole(tmp_path, tensors, config)
    assert torch.equal(got, weight(codes, zeros, scales, group))


def test_gptq_without_groups(tmp_path, random):
    codes, zeros, scales = draw(random, 4, groups=1)
    tensors = {
        "qweight": pack_rows_of(codes, 4).T.contiguous(),
        "qzeros": pack_rows_of(zeros.T - 1, 4),
        "scales": scales.T.contiguous(),
    }
    got = whole(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": -1})
    assert torch.equal(got, weight(codes, zeros, scales, torch.zeros(K, dtype=torch.long)))


def test_awq(tmp_path, random):
    """qweight and qzeros pack outputs, in an order of their own."""
    codes, zeros, scales = draw(random, 4)
    zeros -= 1  # AWQ stores zero points as they are, 0 too
    tensors = {
        "qweight": pack_rows_of(codes.T, 4, AWQ_NIBBLE),
        "qzeros": pack_rows_of(zeros.T, 4, AWQ_NIBBLE),
        "scales": scales.T.contiguous(),
    }
    got = whole(tmp_path, tensors, {"quant_method": "awq", "bits": 4, "group_size": GROUP})
    assert torch.equal(got, weight(codes, zeros, scales, torch.arange(K) // GROUP))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["symmetric", "zero points", "actorder"])
def test_compressed_tensors_packed(tmp_path, random, bits, kind):
    """weight_packed packs inputs, weight_zero_point outputs; symmetric codes are offset."""
    codes, zeros, scales = draw(random, bits)
    group = torch.arange(K) // GROUP
    tensors = {
        "weight_packed": pack_rows_of(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([N, K]),
    }
    if kind == "zero points":
        tensors["weight_zero_point"] = pack_rows_of(zeros.T, bits).T.contiguous()
    else:
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    if kind == "actorder":
        group = group[torch.randperm(K, generator=random)]
        tensors["weight_g_idx"] = group.int()
    symmetric = kind != "zero points"
    args = {"num_bits": bits, "group_size": GROUP, "symmetric": symmetric}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": args}}}
    got = whole(tmp_path, tensors, config)
    assert torch.equal(got, weight(codes, zeros, scales, group))


def fp8_value(byte, exponent_bits):
    """The value of E4M3 (without infinities) or E5M2, None for NaN and infinity."""
    mantissa_bits = 7 - exponent_bits
    bias = (1 << (exponent_bits - 1)) - 1
    sign = -1.0 if byte & 0x80 else 1.0
    exponent = (byte & 0x7F) >> mantissa_bits
    mantissa = byte & ((1 << mantissa_bits) - 1)
    top = (1 << exponent_bits) - 1
    if exponent == top and (exponent_bits == 5 or mantissa == (1 << mantissa_bits) - 1):
        return None
    fraction = mantissa / (1 << mantissa_bits)
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias)
    return sign * (1 + fraction) * 2.0 ** (exponent - bias)


FP8 = {4: torch.float8_e4m3fn, 5: torch.float8_e5m2}


@pytest.mark.parametrize("exponent_bits", FP8)
@pytest.mark.parametrize("scaled", ["tensor", "tensor of one", "channel", "block"])
def test_fp8(tmp_path, random, exponent_bits, scaled):
    """All finite bytes, under scales of a tensor, a row or a block (ragged at the edges)."""
    finite = [b for b in range(256) if fp8_value(b, exponent_bits) is not None]
    assert len(finite) == {4: 254, 5: 248}[exponent_bits]
    picked = torch.randint(0, len(finite), (N, K), generator=random)
    codes = torch.tensor(finite, dtype=torch.uint8)[picked]
    table = torch.tensor([fp8_value(b, exponent_bits) or 0.0 for b in range(256)])
    rows, columns = 32, 96
    shape = {"tensor": (), "tensor of one": (1,), "channel": (N, 1), "block": (3, 3)}[scaled]
    scale = (torch.rand(shape, generator=random) + 0.01).bfloat16().float()
    config = {"quant_method": "compressed-tensors"}
    spread, leaf = scale, "weight_scale"
    if scaled == "block":
        config, leaf = {"quant_method": "fp8", "weight_block_size": [rows, columns]}, f"{leaf}_inv"
        spread = torch.tensor(
            [[scale[n // rows, k // columns].item() for k in range(K)] for n in range(N)]
        )
    tensors = {"weight": codes.view(FP8[exponent_bits]), leaf: scale}
    expected = table[codes.long()].double() * spread.double()
    assert torch.equal(expected.float().double(), expected)
    assert torch.equal(whole(tmp_path, tensors, config), expected.float())
