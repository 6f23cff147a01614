"""Shards of small real images, and an engine without a model that names their colours."""

from __future__ import annotations

import io
import random
import tarfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image
from webdataset import TarWriter

from vllm_qoq.caption.errors import Uncaptioned
from vllm_qoq.caption.messages import Request
from vllm_qoq.caption.records import Caption

MODEL = "colours"


def jpeg(seed: int, size: tuple[int, int] = (24, 16)) -> bytes:
    """A JPEG of one colour, which no other seed below 4096 has."""
    return encoded(Image.new("RGB", size, colour(seed)), "JPEG")


def colour(seed: int) -> tuple[int, int, int]:
    """The colour of `jpeg`, in steps of 16, which JPEG keeps apart."""
    return (seed % 16 * 16, seed // 16 % 16 * 16, seed // 256 % 16 * 16)


def encoded(image: Image.Image, kind: str) -> bytes:
    """The bytes of an image in a format of Pillow."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write(path: Path, samples: Iterable[Mapping[str, object]]) -> Path:
    """A shard, by the library: each sample has a `__key__`, and the bytes of each file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path), encoder=False) as tar:
        for sample in samples:
            tar.write(sample)
    return path


def write_members(path: Path, members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> Path:
    """A tar file of any members, for shards that no tool writes."""
    with tarfile.open(path, "w") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def said(image: Image.Image) -> str:
    """The caption of an image: its size and its colour."""
    pixel = image.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return f"{image.width} x {image.height}, {' '.join(str((c + 8) // 16) for c in pixel)}"


class Colours:
    """An engine that finishes images in any order, each after up to `seconds`."""

    def __init__(self, capacity: int = 6, seconds: float = 0.0) -> None:
        self.capacity, self._seconds = capacity, seconds
        self._given: list[tuple[int, Image.Image]] = []
        self._random = random.Random()

    def add(self, ticket: int, image: Image.Image, seed: int) -> None:
        if image.width > 20 * image.height:
            raise Uncaptioned("refused", f"too wide: {image!r}")
        self._given.append((ticket, image))

    def step(self) -> list[tuple[int, Caption | Uncaptioned]]:
        time.sleep(self._random.random() * self._seconds)
        self._random.shuffle(self._given)
        count = self._random.randint(0, len(self._given))
        done, self._given = self._given[:count], self._given[count:]
        return [
            (ticket, Caption(caption=said(image), prompt_tokens=3, tokens=5, finish="stop"))
            for ticket, image in done
        ]

    def close(self) -> None:
        """There is nothing to end."""


def colours(_: Request) -> Colours:
    """An engine that is as fast as it can be."""
    return Colours()


def slow_colours(_: Request) -> Colours:
    """An engine that takes some milliseconds for each image."""
    return Colours(seconds=0.03)
