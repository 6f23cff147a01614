"""Shards, tar files and images that `vllm-qoq caption` reads: whole, odd and hostile ones."""

import io
import json
import os
import re
import struct
import tarfile
import tracemalloc
import zlib

import caption_shards as shards
import pytest
import webdataset
from PIL import Image

from vllm_qoq.caption import image, tar
from vllm_qoq.caption.errors import CaptionError, Uncaptioned
from vllm_qoq.caption.shards import METADATA, find

ONE = {"__key__": "a", "jpg": shards.jpeg(1)}


@pytest.fixture
def data(tmp_path):
    """Three shards, one in a folder of its own."""
    for name in ("000", "001", "more/000"):
        shards.write(tmp_path / f"{name}.tar", [ONE])
    return tmp_path


def listing(*entries):
    return json.dumps({"wids_version": 1, "shardlist": list(entries)})


def names(named):
    return [shard.name for shard in find(str(named))]


def test_shards_are_found_by_folder_pattern_file_and_list(data):
    assert names(data) == ["000", "001", "more/000"]
    assert names(data / "0*.tar") == ["000", "001"]
    assert names(data / "**/*.tar") == ["000", "001", "more/000"]
    assert names(data / "{001..000}.tar") == ["000", "001"]
    assert names(data / "001.tar") == ["001"]
    listed = data / "list.json"
    listed.write_text(listing({"url": "more/000.tar", "nsamples": 1}))
    (found,) = find(str(listed))
    assert (found.name, found.samples) == ("more/000", 1)
    assert found.bytes == (data / "more" / "000.tar").stat().st_size


def test_a_folder_takes_counts_from_its_list(data):
    size = (data / "001.tar").stat().st_size
    entries = {"url": "./001.tar", "nsamples": 7, "filesize": size}
    (data / METADATA).write_text(listing(entries))
    assert [shard.samples for shard in find(str(data))] == [None, 7, None]


@pytest.mark.parametrize(
    "entry, says",
    [
        ({"url": "lost.tar"}, "lists 'lost.tar', which is no .tar file there"),
        ({"url": "list.json"}, "which is no .tar file there"),
        ({"url": "../x.tar"}, "is no shard below the folder of the list"),
        ({"url": "/x.tar"}, "is no shard below the folder of the list"),
        ({"url": "pipe:touch pwned.tar"}, "is no shard below the folder of the list"),
        ({"url": "000.tar", "filesize": 3}, "bytes, and"),
        ({"url": "000.tar", "nsamples": -1}, "shardlist.0.nsamples"),
        ({"nsamples": 1}, "shardlist.0.url"),
        (3, "shardlist.0"),
    ],
)
def test_lists_that_are_wrong_are_refused(data, entry, says):
    (data / "list.json").write_text(listing(entry))
    with pytest.raises(CaptionError) as refused:
        find(str(data / "list.json"))
    assert says in str(refused.value)


def test_what_a_folder_would_hide_is_refused(data, tmp_path):
    assert names(data) == ["000", "001", "more/000"]
    for make, says in (
        (lambda at: at.with_suffix(".tar.gz").touch(), "unpack or rename it"),
        (lambda at: at.with_suffix(".TAR").touch(), "unpack or rename it"),
        (lambda at: at.symlink_to(data / "more"), "a link to a folder, and these are not followed"),
    ):
        make(data / "more" / "x")
        with pytest.raises(CaptionError, match=says):
            find(str(data))
        for file in (data / "more").glob("x*"):
            file.unlink()
    with pytest.raises(CaptionError, match=r"has \.\. behind the fixed part"):
        find(str(data / "mor*" / ".." / "000.tar"))


def test_what_is_no_shard_is_refused(data, monkeypatch):
    monkeypatch.setattr("vllm_qoq.caption.shards._MOST", 1000)
    os.mkfifo(data / "fifo.tar")
    (data / "x.tar.gz").write_bytes(b"")
    (data / "empty").mkdir()
    shards.write(data / "z" / "a.failures.tar", [ONE])
    for named, says in (
        ("fifo.tar", "not a regular file"),
        ("none.tar", "no such file"),
        ("x.tar.gz", "does not end in .tar"),
        ("{000..001.tar", "close its braces"),
        ("{0..9999999}.tar", "more than 1000 names"),
        ("empty", "no shards are there"),
        ("none.json", "give a list of shards"),
        ("z", "is called like files of the output; rename it"),
        ("*.none.tar", "no shards are there"),
    ):
        with pytest.raises(CaptionError) as refused:
            find(str(data / named))
        assert says in str(refused.value), named


def test_names_whose_files_could_not_be_written_are_refused_before(tmp_path):
    (tmp_path / "a.tar").touch()
    for name, says in (
        ("a.json/b.tar", "is called like a file of the output for 'a'; rename one of both"),
        ("a.partial.jsonl/c/b.tar", "is called like a file of the output for 'a'"),
        (f"{'x' * 235}.tar", "has a name too long for files of the output by 3 bytes; rename it"),
        ("vllm-qoq-caption.x.tar", "is called like files of the output; rename it"),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with pytest.raises(CaptionError) as refused:
            find(str(tmp_path))
        assert says in str(refused.value), name
        path.unlink()
    for name in ("b.json/a.tar", f"{'x' * 232}.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert len(find(str(tmp_path))) == 3


def read(path):
    """The samples of a shard, and the reader when it is at the end."""
    with path.open("rb") as file:
        reader = tar.Reader(file)
        return list(reader), reader


def member(name, content=b"x", kind=tarfile.REGTYPE, **more):
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in more.items():
        setattr(info, key, value)
    return info, content


def test_keys_and_order_are_those_of_the_library(tmp_path):
    path = shards.write_members(
        tmp_path / "0.tar",
        [
            *(member("a.jpg"), member("a.json"), member("b.seg.png"), member("b.JPG")),
            *(member("d/e.f.webp"), member("../up.jpg"), member("/root.jpg"), member("c.txt")),
            *(member("a.png"), member("x\udcff.jpg"), member("last.jpeg")),
        ],
    )
    dataset = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    samples, reader = read(path)
    assert [sample.key for sample in samples] == [sample["__key__"] for sample in dataset]
    assert [sample.position for sample in samples] == list(range(len(samples)))
    files = [sample.member.name if sample.member else None for sample in samples]
    assert files[:6] == ["a.jpg", "b.JPG", "d/e.f.webp", "../up.jpg", "/root.jpg", None]
    assert reader.damage is None and not reader.ignored


def test_members_that_are_no_files_are_ignored_and_counted(tmp_path):
    path = shards.write_members(
        tmp_path / "0.tar",
        [
            member("a.jpg", b"", tarfile.SYMTYPE, linkname="/etc/passwd"),
            member("b.jpg", b"", tarfile.LNKTYPE, linkname="c.jpg"),
            member("p.jpg", b"", tarfile.FIFOTYPE),
            member("folder.jpg", b"", tarfile.DIRTYPE),
            *(member("README"), member("k.__bad__"), member("jpg"), member(".jpg.txt")),
            *(member("._k.jpg"), member("folder/._k.jpg"), member("k.jpg"), member("k.jpg")),
            *(member("k.txt"), member("k.TXT"), member(".hidden.JPG"), member(".jpg")),
        ],
    )
    samples, reader = read(path)
    assert [sample.key for sample in samples] == ["k"]
    ignored = {"links": 2, "special": 1, "no_key": 4, "apple_double": 2, "repeated": 1}
    assert reader.ignored == ignored
    strays = [(one.kind, one.name, one.key) for one in reader.strays]
    assert strays == [
        ("repeated", "k.jpg", "k"),
        ("no_key", ".hidden.JPG", None),
        ("no_key", ".jpg", None),
    ]
    assert reader.damage is None


def test_of_a_sample_of_many_files_the_first_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "_MOST_FILES", 3)
    names = ("a.1", "a.2", "a.3", "a.jpg", "b.1", "b.jpg")
    samples, reader = read(shards.write_members(tmp_path / "0.tar", map(member, names)))
    files = [(sample.key, sample.member and sample.member.name) for sample in samples]
    assert files == [("a", None), ("b", "b.jpg")] and reader.ignored == {"excess": 1}


@pytest.fixture
def whole(tmp_path):
    """Four samples, of each 512 bytes of header and 1024 for an image of 700."""
    members = [member(f"k{n}.jpg", bytes([n]) * 700) for n in range(4)]
    return shards.write_members(tmp_path / "0.tar", members)


@pytest.mark.parametrize("cut", [0, 100, 512, 1100, 1212, 1536, 1600, 3100, 4500, 6144])
def test_of_a_shard_that_is_cut_off_all_before_is_read(whole, cut):
    whole.write_bytes(whole.read_bytes()[:cut])
    found = []
    with whole.open("rb") as file:
        reader = tar.Reader(file)
        for sample in reader:
            try:
                found.append(reader.read(sample.member))
            except Uncaptioned as failure:
                assert failure.kind == "damaged"
    assert int(re.search("byte ([0-9]+)", reader.damage)[1]) <= cut
    assert found == [bytes([n]) * 700 for n in range(4) if 1536 * n + 1212 <= cut]


def test_a_damaged_header_is_not_taken_for_the_end(whole):
    content = bytearray(whole.read_bytes())
    content[3072 + 50] ^= 1
    whole.write_bytes(content)
    samples, reader = read(whole)
    assert len(samples) == 2 and "at byte 3072" in reader.damage


def hostile(kind):
    """Headers that no tool writes."""
    info = tarfile.TarInfo("a.jpg")
    if kind == "negative":
        block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        block[124:136] = b"\xff" * 11 + b"\x00"
    elif kind == "sparse":
        info.type = tarfile.GNUTYPE_SPARSE
        block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        block[482] = 1  # more of the map follows, and more behind it
        more = bytearray(512)
        more[504] = 1
        return _checked(block) + bytes(more) * (4 << 11)
    elif kind == "global":
        return b"".join(_global_header(number) for number in range(200)) + bytes(1024)
    elif kind == "long name":
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
        block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    else:
        info.type, info.size = tarfile.XHDTYPE, 512
        block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        return (_checked(block) + bytes(512)) * 2000
    return _checked(block) + bytes(2048)


def _global_header(number):
    """One with a key of its own, and a file behind it."""
    record = b"%02d key%03d=%s\n" % (99, number, b"x" * 99)
    record = record[:98] + b"\n"
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XGLTYPE, len(record)
    header = bytes(info.tobuf(tarfile.USTAR_FORMAT)) + record.ljust(512, b"\0")
    return header + tarfile.TarInfo(f"{number}.jpg").tobuf(tarfile.USTAR_FORMAT)


def _checked(block):
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "kind, says, samples",
    [
        ("negative", "", 0),
        ("long name", "headers of more than 1048576 bytes", 0),
        ("headers of headers", "", 0),
        ("sparse", "headers of more than 1048576 bytes", 0),
        ("global", "more than 64 global headers", 64),
    ],
)
def test_hostile_headers_end_a_shard(tmp_path, kind, says, samples):
    path = tmp_path / "0.tar"
    path.write_bytes(hostile(kind))
    tracemalloc.start()
    try:
        found, reader = read(path)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == samples and says in reader.damage
    assert most < 16 << 20  # the map of the sparse one would be 20 MiB


def test_a_large_member_is_not_read(tmp_path):
    path = tmp_path / "0.tar"
    info = tarfile.TarInfo("a.jpg")
    info.size = tar.MOST_BYTES + 1
    with path.open("wb") as file:
        file.write(info.tobuf())
        file.truncate(1024 + (info.size + 511) // 512 * 512 + 512)
    with path.open("rb") as file:
        reader = tar.Reader(file)
        (sample,) = reader
        with pytest.raises(Uncaptioned) as refused:
            reader.read(sample.member)
    assert refused.value.kind == "too_large" and reader.damage is None


def kind_of(content):
    with pytest.raises(Uncaptioned) as refused:
        image.decode(content)
    return refused.value.kind


def png_of(width, height):
    """A PNG that claims a size, in 60 bytes."""

    def chunk(name, content):
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_a_lack_of_memory_is_not_taken_for_damage(monkeypatch):
    def lack(_):
        raise MemoryError

    for part in ("_upright", "_rgb"):
        with monkeypatch.context() as patched, pytest.raises(MemoryError):
            patched.setattr(f"vllm_qoq.caption.image.{part}", lack)
            image.decode(shards.jpeg(0))


def test_bytes_that_are_no_image_are_refused_by_kind():
    whole = shards.encoded(Image.effect_noise((64, 64), 50), "JPEG")
    assert kind_of(whole[: len(whole) // 2]) == "damaged"
    assert kind_of(png_of(8, 8)) == "damaged"
    assert kind_of(png_of(9460, 9460)) == "too_large"
    assert kind_of(png_of(1 << 20, 1 << 20)) == "too_large"
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    for content in (b"", b"words", postscript, b"\x80\x04K\x01."):
        assert kind_of(content) == "not_an_image"


def test_images_become_upright_rgb_on_white():
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half.putpixel((0, 0), (0, 0, 255, 255))
    found = image.decode(shards.encoded(half, "PNG"))
    assert found.mode == "RGB"
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 255), (255, 255, 255)]
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    file = io.BytesIO()
    palette.save(file, "GIF", transparency=1)
    assert image.decode(file.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    wide = Image.new("RGB", (8, 2), (9, 9, 9))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    wide.save(file, "JPEG", exif=exif)
    assert image.decode(file.getvalue()).size == (2, 8)
    for kind in ("WEBP", "BMP", "TIFF"):
        assert image.decode(shards.encoded(wide, kind)).getpixel((0, 0)) == (9, 9, 9)
    assert image.decode(shards.encoded(Image.new("L", (2, 2), 7), "PNG")).mode == "RGB"
