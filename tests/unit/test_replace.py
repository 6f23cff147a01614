"""An output is whole or as it was, and only what is ours is ever deleted."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from vllm_qoq.checkpoint import ours, replace
from vllm_qoq.checkpoint.output import check_output
from vllm_qoq.checkpoint.replace import LOCK, OutputError, partial_of, replaced_of, replacing

SECTION = {"quant_method": "qoq", "sets": {"w8a8": {}}}
WRITTEN = ["README.md", "config.json"]
NAMES = ["out", "out[1]", "a*", "b?", ".hidden", "with space", "ü"]


def checkpoint(folder: Path, text: str = "old") -> Path:
    """A folder that counts as ours, with `text` in it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": SECTION}))
    (folder / "README.md").write_text(text)
    return folder


def write(out: Path, overwrite: bool = True) -> None:
    with replacing(out, overwrite, ours.foreign) as folder:
        (folder / "config.json").write_text(json.dumps({"quantization_config": SECTION}))
        (folder / "README.md").write_text("new")


def text(out: Path) -> str:
    return (out / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_an_old_one_of_ours_is_replaced_and_neighbours_stay(tmp_path, name):
    neighbours = [".out1.partial", ".out1.replaced", ".abc.partial-1", ".out.partial-123", "abc"]
    for neighbour in neighbours:
        (tmp_path / neighbour).mkdir()
        (tmp_path / neighbour / "mine").write_text("mine")
    out = checkpoint(tmp_path / name)
    write(out)
    assert text(out) == "new" and not (out / LOCK).exists()
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted([*neighbours, name])


@pytest.mark.parametrize(
    "name", ["model.safetensors", ".config.json.partial-12", "1_Pooling", "chat_template.jinja"]
)
def test_what_belongs_to_a_checkpoint_of_ours_goes_with_it(tmp_path, name):
    out = checkpoint(tmp_path / "out")
    (out / name).mkdir() if name == "1_Pooling" else (out / name).touch()
    check_output(out, [], overwrite=True)
    write(out)
    assert sorted(item.name for item in out.iterdir()) == WRITTEN


def test_what_was_copied_from_a_model_goes_with_it(tmp_path):
    out = checkpoint(tmp_path / "out")
    files = [Path("figures/a/plot.png"), Path("figures/b.png"), Path("configuration.json")]
    for file in files:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).touch()
    index = ours.index({}, 0, files)
    assert index["metadata"][ours.COPIED] == ["configuration.json", "figures"]
    with pytest.raises(OutputError, match=r"holds configuration\.json"):
        check_output(out, [], overwrite=True)
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    check_output(out, [], overwrite=True)


def photos(folder: Path) -> None:
    folder.mkdir()
    (folder / "photo.jpg").write_text("photo")


def ours_and_a_thesis(folder: Path) -> None:
    checkpoint(folder)
    (folder / "thesis.txt").write_text("thesis")


def ours_and_a_folder(folder: Path) -> None:
    photos(checkpoint(folder) / "2024_Summer")


def ours_and_what_an_index_claims(folder: Path) -> None:
    ours_and_a_thesis(folder)
    index = {"weight_map": {"x": "thesis.txt"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def somebodys(folder: Path) -> None:
    checkpoint(folder)
    (folder / "config.json").write_text("{}")


def somebodys_with_a_cache(folder: Path) -> None:
    checkpoint(folder)
    section = {"quant_method": "qoq", "kv_cache": {"bits": 4}}
    (folder / "config.json").write_text(json.dumps({"quantization_config": section}))


def broken(folder: Path) -> None:
    checkpoint(folder)
    (folder / "config.json").write_text("{")


def fifo(folder: Path) -> None:
    folder.mkdir()
    os.mkfifo(folder / "config.json")


def linked(folder: Path) -> None:
    folder.symlink_to(checkpoint(folder.with_name("elsewhere")))


def dangling(folder: Path) -> None:
    folder.symlink_to("nowhere")


def plain_file(folder: Path) -> None:
    folder.write_text("file")


FOREIGN = [
    *(photos, ours_and_a_thesis, ours_and_a_folder, ours_and_what_an_index_claims),
    *(somebodys, somebodys_with_a_cache, broken, fifo),
    *(linked, dangling, plain_file),
]


@pytest.mark.parametrize("make", FOREIGN)
def test_what_is_not_ours_is_refused_by_name_and_stays(tmp_path, make):
    out = tmp_path / "out"
    make(out)
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(OutputError, match="out"):
        check_output(out, [], overwrite=True)
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_the_current_folder_its_parents_and_the_root_are_refused(tmp_path, monkeypatch):
    here = checkpoint(tmp_path / "out") / "assets"
    here.mkdir()
    monkeypatch.chdir(here)
    for out in (".", "", "..", "../../out", "/", "../assets"):
        with pytest.raises(OutputError, match="current folder"):
            check_output(Path(out), [], overwrite=True)


@pytest.mark.parametrize("name", ["x" * 250, "ü" * 125, "\udcff"])
def test_names_that_cannot_be_written_are_refused(tmp_path, name):
    with pytest.raises(OutputError):
        check_output(tmp_path / name, [], overwrite=False)


def test_inputs_and_what_is_around_them_are_refused(tmp_path):
    model = checkpoint(tmp_path / "model")
    (tmp_path / "link").symlink_to(model)
    for out in (model, model / "out", tmp_path, tmp_path / "link", tmp_path / "link" / "out"):
        with pytest.raises(OutputError, match=r"overlaps|link"):
            check_output(out, [model], overwrite=True)


def test_what_appears_in_the_old_one_meanwhile_is_kept(tmp_path):
    out = checkpoint(tmp_path / "out")
    with (
        pytest.raises(OutputError, match=r"thesis\.txt"),
        replacing(out, True, ours.foreign) as folder,
    ):
        (folder / "README.md").write_text("new")
        (out / "thesis.txt").write_text("thesis")
    assert (out / "thesis.txt").exists() and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("error", [OSError(5, "x"), KeyboardInterrupt(), MemoryError()])
def test_the_old_one_is_back_whatever_fails_between_the_renames(tmp_path, monkeypatch, nth, error):
    out, real = checkpoint(tmp_path / "out"), Path.rename
    calls = []

    def failing(self, target):
        calls.append(target)
        if len(calls) == nth:
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(type(error)):
        write(out)
    assert text(out) == "old" and list(tmp_path.iterdir()) == [out]


def test_a_failing_sync_restores_too(tmp_path, monkeypatch):
    out = checkpoint(tmp_path / "out")

    def failing(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replace, "sync_folder", failing)
    with pytest.raises(OSError, match="No space"):
        write(out)
    assert text(out) == "old" and list(tmp_path.iterdir()) == [out]


# Sends itself signals at a point of its work, and prints what is left to do as main does.
SIGNALLED = """
import os, signal, sys
from pathlib import Path
from vllm_qoq.checkpoint import ours, replace
point, number, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
signal.signal(signal.SIGINT, signal.default_int_handler)
count = {"rename": 0, "unlink": 0}
def send(): os.kill(os.getpid(), number)
def hook(name, real):
    def call(self, *arguments, **options):
        count[name] += 1
        if point == f"{name} {count[name]}" or (point, name) == ("twice", "unlink"): send()
        return real(self, *arguments, **options)
    setattr(Path, name, call)
hook("rename", Path.rename)
hook("unlink", Path.unlink)
try:
    with replace.replacing(out, True, ours.foreign) as folder:
        (folder / "config.json").write_text((out / "config.json").read_text())
        (folder / "README.md").write_text("new")
        if point in ("body", "twice"): send()
except KeyboardInterrupt as error:
    print(error)
    sys.exit(130)
"""


def run(point: str, number: int, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SIGNALLED, point, str(int(number)), str(out)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("point", ["body", "twice", "rename 1", "rename 2", "unlink 1"])
def test_a_signal_leaves_the_old_one_or_the_new_one(tmp_path, point, number):
    out = checkpoint(tmp_path / "out")
    done = run(point, number, out)
    is_late = point not in ("body", "twice")  # the work is done, and finished
    assert done.returncode == (0 if is_late else 130), done.stderr
    assert text(out) == ("new" if is_late else "old")
    assert is_late or done.stdout == f"{out} is as it was\n"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("point", ["body", "rename 1", "rename 2"])
@pytest.mark.parametrize("name", ["out", "out[1]"])
def test_after_a_kill_the_next_run_brings_the_old_one_back_and_clears_up(
    tmp_path, capsys, point, name
):
    out = checkpoint(tmp_path / name)
    assert run(point, signal.SIGKILL, out).returncode == -signal.SIGKILL
    assert partial_of(out).exists()
    assert out.exists() is (point != "rename 2")
    with pytest.raises(OutputError, match="exists already"):
        check_output(out, [], overwrite=False)
    assert text(out) == "old"
    assert ("is back" in capsys.readouterr().err) is (point == "rename 2")
    write(out)
    assert text(out) == "new" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_kill_while_the_old_one_is_deleted_leaves_what_the_next_run_deletes(tmp_path, nth):
    out = checkpoint(tmp_path / "out")
    assert run(f"unlink {nth}", signal.SIGKILL, out).returncode == -signal.SIGKILL
    assert text(out) == "new" and len(list(replaced_of(out).iterdir())) == 4 - nth
    write(out)
    assert not replaced_of(out).exists() and sorted(f.name for f in out.iterdir()) == WRITTEN


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_kill_while_an_unfinished_one_is_deleted_leaves_a_leftover(tmp_path, nth):
    out, left = tmp_path / "out", partial_of(tmp_path / "out")
    checkpoint(left)
    (left / LOCK).touch()
    assert run(f"unlink {nth}", signal.SIGKILL, out).returncode == -signal.SIGKILL
    assert len(list(left.iterdir())) == 4 - nth
    write(out)
    assert list(tmp_path.iterdir()) == [out]


def test_what_a_living_run_writes_is_left_alone(tmp_path):
    out = tmp_path / "out"
    with replacing(out, False, ours.foreign) as folder:
        # As from another container: nothing but the lock tells.
        for refused in (lambda: check_output(out, [], True), lambda: write(out)):
            with pytest.raises(OutputError, match="another run is writing"):
                refused()
        (folder / "README.md").write_text("first")
    assert text(out) == "first" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("of", [partial_of, replaced_of])
def test_a_folder_of_somebodys_in_the_way_is_refused(tmp_path, of):
    out = tmp_path / "out"
    photos(of(out))
    if of is replaced_of:
        checkpoint(out)
    with pytest.raises(OutputError, match="in the way, and not ours"):
        write(out)
    assert (of(out) / "photo.jpg").exists()


def test_an_unlocked_partial_folder_with_our_file_is_a_leftover(tmp_path):
    left = partial_of(tmp_path / "out")
    left.mkdir()
    (left / LOCK).touch()
    with open(left / LOCK, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another run"):
            write(tmp_path / "out")
    write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
