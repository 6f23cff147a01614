"""A model as the Hugging Face cache keeps it, links into ../../blobs, through every command."""

import json
import shutil

import pytest
import rtn_checkpoints
from conftest import DATA
from qserve_checkpoints import CONFIG, g128
from qserve_checkpoints import model as qserve_model
from safetensors.torch import save_file

from vllm_qoq.cli import main as cli
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.plan import Job, check_job

TINY = DATA / "tiny-llama"


def cached(folder, hub):
    """Move the files of a folder into a cache; its snapshot."""
    model = hub / f"models--org--{folder.name}"
    snapshot = model / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, model / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


@pytest.fixture
def run(monkeypatch):
    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["vllm-qoq", *map(str, arguments)])
        assert cli.main() == 0

    return command


def holds_no_links(folder):
    return not any(file.is_symlink() for file in folder.rglob("*"))


def test_merge_inspect_and_verify(tmp_path, run):
    w8a8 = cached(rtn_checkpoints.w8a8(TINY, tmp_path / "w8a8"), tmp_path / "hub")
    gptq = cached(rtn_checkpoints.gptq(TINY, tmp_path / "gptq"), tmp_path / "hub")
    run("merge", f"w8a8={w8a8}", f"w4a16={gptq}", "-o", tmp_path / "out", "-q")
    assert holds_no_links(tmp_path / "out")
    out = cached(tmp_path / "out", tmp_path / "hub")
    run("inspect", out)
    run("verify", f"{out}/", "-q")


def test_import(tmp_path, run):
    for name in ("source", "base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
        (tmp_path / name / "tokenizer.json").write_text("{}")
    save_file(qserve_model(g128)[0], tmp_path / "source" / "model.safetensors")
    source, base = (cached(tmp_path / name, tmp_path / "hub") for name in ("source", "base"))
    run("import", source, "--base", base, "-o", tmp_path / "out", "-q")
    assert holds_no_links(tmp_path / "out")
    run("verify", tmp_path / "out", "-q")


def test_quantize(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    model, out = cached(tmp_path / "model", tmp_path / "hub"), tmp_path / "out"
    text, work = DATA / "calibration.txt", tmp_path / "work"
    job = Job(model=model, out=out, text=text, work_dir=work, quiet=True)
    assert check_job(job, QuantizeOptions(samples=1, seqlen=16)).samples
