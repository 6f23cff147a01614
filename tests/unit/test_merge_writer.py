"""Whatever the writer writes, the safetensors library reads back bit for bit."""

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from vllm_qoq.checkpoint import writer
from vllm_qoq.checkpoint.folder import ITEM_BYTES, TensorInfo
from vllm_qoq.checkpoint.writer import sync_folder, write_bytes, write_json, write_shard

TORCH_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
}
# `__metadata__` is a key of the header; surrogates cannot be encoded.
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def shards(draw):
    """TensorInfos with distinct names, in any order, and the bytes of each."""
    names = draw(st.lists(NAMES, unique=True, max_size=8))
    infos = [
        TensorInfo(name, draw(st.sampled_from(sorted(ITEM_BYTES))), draw(SHAPES), "x")
        for name in names
    ]
    # Readers map tensors without a copy only if wide items come first (merge_tools.plan).
    infos.sort(key=lambda info: -ITEM_BYTES[info.dtype])
    contents = {}
    for info in infos:
        data = draw(st.binary(min_size=info.nbytes, max_size=info.nbytes))
        # A bool is 0 or 1; every other pattern of bits is a value, NaN included.
        contents[info.name] = bytes(b & 1 for b in data) if info.dtype == "BOOL" else data
    return infos, contents


def test_every_dtype_of_a_checkpoint_is_tried():
    assert TORCH_DTYPES.keys() == ITEM_BYTES.keys()


@given(shards(), st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_the_library_reads_back_every_bit(shard, piece):
    infos, contents = shard

    def read(info):
        data = contents[info.name]
        return (data[start : start + piece] for start in range(0, len(data), piece))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_shard(path, infos, read)
        umask = os.umask(0)
        os.umask(umask)
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == set(contents)
            assert file.metadata() == {"format": "pt"}
            for info in infos:
                tensor = file.get_tensor(info.name)
                assert tensor.dtype is getattr(torch, TORCH_DTYPES[info.dtype])
                assert tuple(tensor.shape) == info.shape
                assert _bytes(tensor) == contents[info.name]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_of_the_umask(tmp_path, umask):
    """The safetensors library writes 0600, which a server of another user cannot read."""
    before = os.umask(umask)
    try:
        write_shard(tmp_path / "shard", [], lambda info: [])
        write_json(tmp_path / "json", {})
    finally:
        os.umask(before)
    assert {item.stat().st_mode & 0o777 for item in tmp_path.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("data", [b"", b"12345", b"1234567"])
def test_a_tensor_of_another_length_is_an_error(tmp_path, data):
    info = TensorInfo("a", "U8", (6,), "x")
    with pytest.raises(OSError, match=f"a: wrote {len(data)} bytes instead of 6"):
        write_shard(tmp_path / "shard", [info], lambda info: [data])


def test_an_existing_file_is_never_overwritten(tmp_path):
    write_bytes(tmp_path / "file", b"mine")
    with pytest.raises(FileExistsError):
        write_bytes(tmp_path / "file", b"yours")
    assert (tmp_path / "file").read_bytes() == b"mine"


def _bytes(tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_a_file_system_that_syncs_no_folders_will_do(tmp_path, monkeypatch):
    def fsync(code):
        def failing(descriptor):
            raise OSError(code, os.strerror(code))

        return failing

    monkeypatch.setattr(writer.os, "fsync", fsync(errno.EINVAL))
    sync_folder(tmp_path)
    monkeypatch.setattr(writer.os, "fsync", fsync(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)
