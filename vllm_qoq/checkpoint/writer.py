"""Writing of files, so that they are complete and on the disk or an error is raised.

The safetensors library can only write a file whose tensors are all in memory, so
shards are written here, one piece after the other. The format is the length of the
header (8 bytes, little endian), the header (JSON: name -> dtype, shape, first and
last byte), and the bytes of the tensors without gaps. The tests read the result back
with the library.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from vllm_qoq.checkpoint.folder import TensorInfo

_COPY_BYTES = 16 << 20
# Network file systems that sync files, but no folders, answer with one of these.
_NO_SYNC = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


@contextmanager
def durable(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file for writing; at the end of the block it is on the disk and closed.

    The file mode follows the umask. A failing flush or close raises OSError: on a full
    disk, that is the only sign of a file cut short.
    """
    try:
        with open(path, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # The system names the file of a failing open, but not of a failing write.
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a new small file."""
    with durable(path) as file:
        file.write(content)


def replace_file(path: Path, content: bytes) -> None:
    """Give the file `path` this content, at once and for good: readers see the old or the new.

    What a symbolic link points to stays as it is; the link becomes a file.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.unlink(missing_ok=True)
    try:
        write_bytes(partial, content)
        if path.exists():
            shutil.copymode(path, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def json_bytes(content: object) -> bytes:
    """Encode `content` as JSON like transformers: indented, in UTF-8."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, content: object) -> None:
    """Write `content` as a new small file of JSON."""
    write_bytes(path, json_bytes(content))


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of `source`; a symbolic link becomes a real file."""
    with open(source, "rb") as reader, durable(target) as writer:
        while piece := reader.read(_COPY_BYTES):
            writer.write(piece)


def write_shard(
    path: Path,
    tensors: Sequence[TensorInfo],
    read: Callable[[TensorInfo], Iterable[bytes | memoryview]],
) -> None:
    """Write a safetensors file with `tensors` in this order.

    `read` gives the bytes of a tensor, row-major and little endian, in pieces; never
    more than one piece is held.
    """
    with durable(path) as file:
        file.write(header(tensors))
        for info in tensors:
            written = sum(file.write(piece) for piece in read(info))
            if written != info.nbytes:
                raise OSError(f"{info.name}: wrote {written} bytes instead of {info.nbytes}")


def header(tensors: Sequence[TensorInfo]) -> bytes:
    """Make length and header of a shard; the bytes of `tensors` follow in their order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for info in tensors:
        end = offset + info.nbytes
        entries[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # The data begin at a multiple of 8 bytes.
    return len(text).to_bytes(8, "little") + text


def sync_folder(path: Path) -> None:
    """Make the names in the folder `path` survive a power cut, where its file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)
