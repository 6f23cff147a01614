"""The work folder: whose files it holds, what is deleted, and what a later run may go on with."""

import errno
import json
import os
import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from vllm_qoq.quantizer import QuantizeError, workdir
from vllm_qoq.quantizer.workdir import WorkDir

RUN = {"text": "a", "sets": ("w8a8",), "samples": 4}
PIECE = {"x": torch.arange(6.0), "y": torch.ones(2, 3, dtype=torch.bfloat16)}


def begun(folder, run=RUN, resume="auto"):
    """A work folder with one finished piece, of a run that was killed."""
    with WorkDir.open(folder, run, resume) as work:
        work.save("block-0000", PIECE, [1])
    return folder


def contents(folder):
    return {
        file.name: "fifo" if file.is_fifo() else file.is_file() and file.read_bytes()
        for file in folder.iterdir()
    }


def test_sets_may_share_a_tensor_and_its_memory(tmp_path):
    """On a CPU nothing is copied on the way: the bias of a layer, and views of one matrix."""
    bias, matrix = torch.randn(4), torch.randn(4, 4)
    tensors = {"a.bias": bias, "b.bias": bias, "rows": matrix[1:3], "all": matrix, "t": matrix.t()}
    with WorkDir.open(tmp_path / "work", RUN, "auto") as work:
        work.save("piece", tensors, {})
        loaded = work.load("piece")
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
        # Not the matrix for a row of it.
        assert work.file("piece").stat().st_size < 4 * (4 + 4 + 8 + 16 + 16) + 800


def fifo(path):
    os.mkfifo(path)


def foreign_piece(path):
    save_file({"photo": torch.zeros(3)}, path)


FOREIGN = {
    "another file": ("holiday.jpg", lambda path: path.write_bytes(b"x")),
    "weights": ("model.safetensors", foreign_piece),
    "weights of our name": ("block-0000.safetensors", foreign_piece),
    "a partial file": (".block-0000.safetensors.partial", lambda path: path.write_bytes(b"x")),
    "their lock": ("vllm-qoq.lock", lambda path: path.write_bytes(b"x")),
    "their fingerprint": ("fingerprint.json", lambda path: path.write_text('{"finger": 1}')),
    "an old fingerprint": ("fingerprint.json", lambda path: path.write_text(json.dumps(RUN))),
    "half a fingerprint": ("fingerprint.json", lambda path: path.write_text('{"vllm-qoq')),
    "a FIFO fingerprint": ("fingerprint.json", fifo),
    "a FIFO lock": ("vllm-qoq.lock", fifo),
    "a FIFO piece": ("block-0000.safetensors", fifo),
    "a folder": ("block-0000.safetensors", lambda path: path.mkdir()),
    "a link": ("fingerprint.json", lambda path: path.symlink_to(path.parent.parent / "victim")),
    "a linked lock": ("vllm-qoq.lock", lambda path: path.symlink_to(path.parent.parent / "victim")),
}


@pytest.mark.parametrize("resume", ["auto", "required", "never"])
@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_folder_is_refused_and_stays_as_it_is(tmp_path, case, resume):
    (tmp_path / "victim").write_text("{}")
    (tmp_path / "work").mkdir()
    name, make = FOREIGN[case]
    make(tmp_path / "work" / name)
    before = contents(tmp_path / "work")
    with (
        pytest.raises(QuantizeError, match=r"not a work folder.*choose another --work-dir"),
        WorkDir.open(tmp_path / "work", RUN, resume),
    ):
        pass
    assert contents(tmp_path / "work") == before
    assert (tmp_path / "victim").read_text() == "{}"


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_weights_beside_our_pieces_are_refused_by_name(tmp_path, resume):
    work = begun(tmp_path / "work")
    foreign_piece(work / "model.safetensors")
    before = contents(work)
    with (
        pytest.raises(QuantizeError, match=r"model\.safetensors: cannot go on.*move it out"),
        WorkDir.open(work, RUN, resume),
    ):
        pass
    assert contents(work) == before


def test_other_files_beside_our_pieces_stay(tmp_path):
    work = begun(tmp_path / "work")
    (work / "notes.txt").write_text("mine")
    with WorkDir.open(work, RUN, "auto") as again:
        assert again.has("block-0000")
        again.remove()
    assert contents(work) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("made_by_user", [True, False])
def test_a_folder_that_the_user_made_stays(tmp_path, made_by_user):
    if made_by_user:
        (tmp_path / "work").mkdir()
    with WorkDir.open(begun(tmp_path / "work"), RUN, "auto") as work:
        work.remove()
    assert (tmp_path / "work").exists() == made_by_user


def test_never_begins_anew_in_a_folder_of_another_run(tmp_path):
    work = begun(tmp_path / "work", RUN | {"samples": 8})
    with WorkDir.open(work, RUN, "never") as again:
        assert not again.has("block-0000")
        again.save("block-0000", PIECE, [])
    with WorkDir.open(work, RUN, "required") as again:
        assert again.has("block-0000")
        again.remove()
    assert not work.exists()


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), WorkDir.open(tmp_path / "work", RUN, "auto"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_what_was_killed_before_it_had_a_fingerprint_goes_with_the_folder(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "vllm-qoq.lock").touch()
    (work / ".fingerprint.json.partial-0123456789abcdef").write_text('{\n  "vllm-qoq wo')
    with WorkDir.open(work, RUN, "auto") as again:
        again.save("block-0000", PIECE, [])
        again.remove()
    assert not work.exists()


@contextmanager
def full_after(count):
    """A disk that takes no file of more than `count` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_told_with_the_file_and_takes_no_finished_piece(tmp_path):
    work = begun(tmp_path / "work")
    before = contents(work)
    with (
        pytest.raises(OSError, match="File too large") as raised,
        WorkDir.open(work, RUN, "auto") as again,
        full_after(1000),
    ):
        again.save("block-0001", {"x": torch.zeros(1000)}, [])
    assert raised.value.filename.startswith(str(work / ".block-0001.safetensors"))
    assert contents(work) == before
    with (
        pytest.raises(OSError, match="File too large"),
        full_after(100),
        WorkDir.open(tmp_path / "new", RUN, "auto"),
    ):
        pass
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir.os, "access", lambda path, mode: False)
    for folder in (tmp_path, tmp_path / "work"):
        with pytest.raises(QuantizeError, match="not writable; choose another --work-dir"):
            workdir.stored_bytes(folder)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-5])


def cut_in_the_header(path):
    path.write_bytes(path.read_bytes()[:40])


def empty(path):
    path.write_bytes(b"")


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_off, cut_in_the_header, empty, flipped])
def test_a_damaged_piece_is_refused_by_name_and_computed_again_without_it(tmp_path, damage):
    piece = begun(tmp_path / "work") / "block-0000.safetensors"
    damage(piece)
    with (
        pytest.raises(QuantizeError, match=r"block-0000\.safetensors: cannot go on.*move it out"),
        WorkDir.open(tmp_path / "work", RUN, "auto"),
    ):
        pass
    piece.unlink()
    with WorkDir.open(tmp_path / "work", RUN, "required") as work:
        assert not work.has("block-0000")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "b"}, "text was 'a' and is 'b' now"),
        ({"sets": ("w8a8", "w4a8")}, r"sets was \['w8a8'\] and is \['w8a8', 'w4a8'\] now"),
        ({"new": 1}, "new was None and is 1 now"),
    ],
)
def test_another_run_is_refused_with_both_values_and_a_remedy(tmp_path, change, message):
    begun(tmp_path / "work")
    with pytest.raises(QuantizeError, match=message + ".*--resume never"):
        workdir.check(tmp_path / "work", RUN | change, "auto")


def test_two_processes_do_not_share_a_folder(tmp_path):
    with WorkDir.open(tmp_path / "work", RUN, "auto") as work:
        work.save("piece", PIECE, [])
        with (
            pytest.raises(QuantizeError, match="another process"),
            WorkDir.open(tmp_path / "work", RUN, "auto"),
        ):
            pass
        assert work.has("piece")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch, code):
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(workdir.fcntl, "flock", flock)
    assert begun(tmp_path / "work").exists()


def test_a_failing_lock_is_told(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(workdir.fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"):
        begun(tmp_path / "work")


def test_what_a_killed_run_left_unfinished_goes_with_the_folder(tmp_path):
    work = begun(tmp_path / "work")
    run = json.loads((work / "fingerprint.json").read_text())["run"]
    assert run["samples"] == 4
    with WorkDir.open(work, RUN, "auto") as again:
        partial = work / f".block-0001.safetensors.partial-{workdir._run(RUN)}"
        partial.write_bytes(b"half")
        again.remove()
    assert not work.exists()
