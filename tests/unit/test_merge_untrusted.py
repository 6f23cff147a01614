"""Folders that nobody vouches for: FIFOs, pickles, JSON bombs, lost tensors."""

import json
import os
import pickle
import re
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from merge_tools.__main__ import main
from vllm_qoq.checkpoint.folder import INDEX
from vllm_qoq.checkpoint.format import split_layer

SHARD = "model.safetensors"
HANGING_SECONDS = 15.0


@pytest.fixture
def pair(w8a8_dir, w4a16_dir, tmp_path):
    """Copies that a test may damage."""
    for name, source in (("w8a8", w8a8_dir), ("w4a16", w4a16_dir)):
        shutil.copytree(source, tmp_path / name)
    return tmp_path


@pytest.fixture
def merged(merged_dir, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(merged_dir, tmp_path / "merged"))


@pytest.fixture
def command(monkeypatch):
    """command(ARGUMENT, ...): the exit code of `merge_tools ARGUMENT ...`."""

    def run(*arguments) -> int:
        monkeypatch.setattr("sys.argv", ["merge_tools", *map(str, arguments)])
        return main()

    return run


@pytest.fixture
def merge(command, pair):
    """merge(): the exit code of a merge of `pair` into pair / "out"."""
    sets = [f"{name}={pair / name}" for name in ("w8a8", "w4a16")]
    return lambda: command("merge", *sets, "-o", pair / "out", "--quiet")


@contextmanager
def nobody_reads(path: Path):
    """Put a FIFO at `path`. Whoever waits for its content is released in the end, and it fails."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    done, readers = threading.Event(), []

    def release() -> None:
        while not done.wait(HANGING_SECONDS):
            try:
                # Opens only when somebody holds the other end open; closing is their end of file.
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                readers.append(path.name)
            except OSError:
                pass

    thread = threading.Thread(target=release)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not readers, f"hung on {readers[0]}"


def refused(capsys, *named) -> bool:
    message = capsys.readouterr().err
    assert all(part in message for part in named), message
    return message.startswith("error: ") and message.count("\n") == 1


@pytest.mark.parametrize("name", [SHARD, "config.json", INDEX, "tokenizer.json"])
def test_a_fifo_in_place_of_a_file_is_refused_without_hanging(merge, pair, capsys, name):
    with nobody_reads(pair / "w8a8" / name):
        assert merge() == 2
    assert refused(capsys, name)
    assert not (pair / "out").exists()


@pytest.mark.parametrize("name", ["config.json", INDEX, "shard"])
@pytest.mark.parametrize("what", ["verify", "inspect"])
def test_a_fifo_in_a_merged_checkpoint_is_refused_without_hanging(
    command, merged, capsys, name, what
):
    name = min(merged.glob("*.safetensors")).name if name == "shard" else name
    with nobody_reads(merged / name):
        assert command(what, merged) == 2
    assert refused(capsys, name, "not a regular file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "notes.txt"])
def test_a_fifo_beside_the_weights_is_not_opened(merge, pair, name):
    with nobody_reads(pair / "w8a8" / name):
        assert merge() == 0
    assert not (pair / "out" / name).exists()


class Canary:
    """Unpickled, it makes the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def canary(pair):
    """A pickle beside the weights of w8a8, and the file that tells when it has run."""
    sung = pair / "sung"
    content = pickle.dumps(Canary(sung))
    pickle.loads(content).close()
    assert sung.exists(), "the canary cannot sing"
    sung.unlink()
    (pair / "w8a8" / "pytorch_model.bin").write_bytes(content)
    return sung


def test_a_pickle_is_neither_run_nor_copied(merge, pair, canary):
    assert merge() == 0
    assert not canary.exists()
    assert not list((pair / "out").glob("*.bin"))


def test_a_folder_of_pickles_is_refused(merge, pair, canary, capsys):
    (pair / "w8a8" / SHARD).unlink()
    assert merge() == 2
    assert refused(capsys, "pytorch_model.bin", "safetensors") and not canary.exists()


def test_an_index_of_pickles_is_refused(merge, pair, canary, capsys):
    index = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (pair / "w8a8" / INDEX).write_text(json.dumps(index))
    assert merge() == 2
    assert refused(capsys, INDEX, "pytorch_model.bin") and not canary.exists()


BOMBS = {
    "deep lists": b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deeper than any config": b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}",
    "open end": b'{"a": ' + b"[" * 200_000,
    "long integer": b'{"a": ' + b"9" * 50_000 + b"}",
    "twice the same key": b'{"a": 1, "a": 2}',
    "not UTF-8": b'{"a": "\xff"}',
    "not an object": b"[]",
    "empty": b"",
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_json_bomb_is_refused(merge, pair, capsys, name, content):
    (pair / "w8a8" / name).write_bytes(content)
    assert merge() == 2
    assert refused(capsys, name)


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json"])
def test_a_huge_json_file_is_refused_without_reading_it(merge, pair, capsys, name):
    with open(pair / "w8a8" / name, "wb") as file:
        file.truncate(1 << 40)  # sparse: takes no disk, but a reader would run out of memory
    assert merge() == 2
    assert refused(capsys, name, "larger than")


def lose(folder: Path, tensor: str, from_index: bool) -> None:
    """Remove a tensor from the shard that holds it, and from the index if told so."""
    index = json.loads((folder / INDEX).read_text())
    shard = folder / index["weight_map"][tensor]
    weights = load_file(shard)
    del weights[tensor]
    save_file(weights, shard, {"format": "pt"})
    if from_index:
        del index["weight_map"][tensor]
        (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        ("w4a16.model.layers.1.mlp.down_proj.weight_scale", "w4a16: .*{layer}.weight_scale: miss"),
        ("w8a8.model.layers.0.self_attn.q_proj.weight", "w8a8: .*{layer}.weight: miss"),
        ("w4a16.model.layers.0.mlp.up_proj.input_ratio", "w4a16.{layer}.input_ratio: .*missing"),
        ("model.layers.1.input_layernorm.weight", "w8a8: {layer}: missing"),
        ("model.embed_tokens.weight", "w8a8: {layer}.weight: missing"),
    ],
)
def test_verify_reports_a_missing_tensor(command, merged, capsys, tensor, named):
    assert command("verify", merged, "-q", "--json") == 0
    capsys.readouterr()
    lose(merged, tensor, from_index=True)
    assert command("verify", merged, "-q", "--json") == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    layer = split_layer(tensor.removeprefix("w4a16.").removeprefix("w8a8."))[0]
    pattern = re.compile(named.format(layer=re.escape(layer)))
    assert any(pattern.search(finding) for finding in findings), findings


def test_verify_refuses_an_index_that_lists_what_is_not_there(command, merged, capsys):
    tensor = "w4a16.model.layers.1.mlp.down_proj.weight_scale"
    lose(merged, tensor, from_index=False)
    assert command("verify", merged, "-q") == 2
    assert refused(capsys, tensor, "the file lacks it")
