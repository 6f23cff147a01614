"""The merge command on real checkpoints: what it writes, what it refuses, what survives."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge_tools.__main__ import main
from vllm_qoq.checkpoint import writer


def command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["merge_tools", *map(str, arguments)])
    return main()


@pytest.fixture
def pair(w8a8_dir, w4a16_dir, tmp_path):
    """Copies that a test may damage."""
    for name, source in (("w8a8", w8a8_dir), ("w4a16", w4a16_dir)):
        shutil.copytree(source, tmp_path / name)
    return tmp_path


def merge(monkeypatch, pair, *options, out="out") -> int:
    sets = [f"{name}={pair / name}" for name in ("w8a8", "w4a16")]
    return command(monkeypatch, "merge", *sets, "-o", pair / out, "--quiet", *options)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def edit(folder: Path, change) -> None:
    weights = tensors(folder)
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def leftovers(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir() if item.name not in ("w8a8", "w4a16"))


def test_every_tensor_is_stored_once_and_unchanged(monkeypatch, pair):
    assert merge(monkeypatch, pair) == 0
    merged = tensors(pair / "out")
    ratios = {name for name in merged if name.endswith("input_ratio")}
    sources = {name: tensors(pair / name) for name in ("w8a8", "w4a16")}
    expected = {}
    for name, weights in sources.items():
        for tensor, value in weights.items():
            if "_proj." in tensor:
                expected[f"{name}.{tensor}"] = value
            elif name == "w8a8":
                expected[tensor] = value
    assert merged.keys() - ratios == expected.keys()
    assert all(torch.equal(merged[name], value) for name, value in expected.items())
    norm = "model.layers.1.post_attention_layernorm.weight"
    quotient = sources["w4a16"][norm].float() / sources["w8a8"][norm].float()
    for reader in ("gate_proj", "up_proj"):
        ratio = merged[f"w4a16.model.layers.1.mlp.{reader}.input_ratio"]
        assert torch.equal(ratio, quotient) and not torch.equal(ratio, torch.ones_like(ratio))
    assert len(ratios) == 2 * 5


def test_norms_may_differ_in_some_layers_alone(monkeypatch, pair):
    own = load_file(pair / "w8a8" / "model.safetensors")

    def change(weights):
        for name in weights:
            if name.endswith(".layers.0.post_attention_layernorm.weight"):
                weights[name] = own[name].to(weights[name].dtype)

    edit(pair / "w4a16", change)
    assert merge(monkeypatch, pair) == 0
    ratios = {name for name in tensors(pair / "out") if name.endswith("input_ratio")}
    assert {name.split(".")[3] for name in ratios if ".mlp." in name} == {"1"}
    assert command(monkeypatch, "verify", pair / "out", "-q") == 0


def test_config_and_other_files_come_along(monkeypatch, pair):
    assert merge(monkeypatch, pair, "--decode", "16:w4a16,w8a8") == 0
    config = json.loads((pair / "out" / "config.json").read_text())
    section = config.pop("quantization_config")
    source = json.loads((pair / "w8a8" / "config.json").read_text())
    assert section["sets"]["w8a8"] == source.pop("quantization_config")
    assert config == source
    assert section["routing"]["decode"] == [{"max_batch": 16, "set": "w4a16"}, {"set": "w8a8"}]
    names = {item.name for item in (pair / "out").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "README.md"} <= names
    umask = os.umask(0)
    os.umask(umask)
    for item in (pair / "out").iterdir():
        assert item.stat().st_mode & 0o777 == 0o666 & ~umask


def test_each_set_has_shards_of_its_own(monkeypatch, pair):
    assert merge(monkeypatch, pair, "--max-shard-size", "300KB") == 0
    for file in (pair / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            owners = {name.split(".")[0] for name in shard.keys()}  # noqa: SIM118
        assert not {"w8a8", "w4a16"} <= owners and len(owners - {"model", "lm_head"}) <= 1


def test_merged_checkpoint_verifies_and_inspects(monkeypatch, pair, capsys):
    assert merge(monkeypatch, pair) == 0
    assert command(monkeypatch, "verify", pair / "out", "-q") == 0
    capsys.readouterr()
    assert command(monkeypatch, "inspect", pair / "out", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sets"]["w8a8"]["bits_per_weight"] == pytest.approx(8, abs=0.1)
    assert report["sets"]["w4a16"]["bits_per_weight"] == pytest.approx(4.18, abs=0.1)


def test_dry_run_writes_nothing(monkeypatch, pair, capsys):
    assert merge(monkeypatch, pair, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["dry_run"] is True
    assert leftovers(pair) == []


def scale_key_rows(weights):
    weights["model.layers.1.self_attn.k_proj.weight_scale"][4:8] *= 1.25


def lose_a_tensor(weights):
    del weights["model.layers.1.mlp.up_proj.weight_scale"]


def make_a_scale_negative(weights):
    weights["model.layers.0.mlp.up_proj.weight_scale"][3] *= -1


def make_a_norm_infinite(weights):
    weights["model.norm.weight"][3] = float("inf")


def change_the_embedding(weights):
    weights["model.embed_tokens.weight"][3] *= 2


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (scale_key_rows, "model.layers.1.self_attn.k_proj: row 4"),
        (lose_a_tensor, "model.layers.1.mlp.up_proj.weight_scale"),
        (make_a_scale_negative, "model.layers.0.mlp.up_proj.weight_scale"),
        (make_a_norm_infinite, "model.norm.weight"),
        (change_the_embedding, "model.embed_tokens.weight"),
    ],
)
def test_damage_is_refused_by_name_and_nothing_is_written(monkeypatch, pair, capsys, change, name):
    edit(pair / "w8a8", change)
    assert merge(monkeypatch, pair) == 2
    message = capsys.readouterr().err
    assert name in message and message.count("\n") == 1, message
    assert leftovers(pair) == []


@pytest.mark.parametrize(
    ("file", "key", "value", "named"),
    [
        ("config.json", "vocab_size", 1000, "vocab_size"),
        ("config.json", "architectures", ["MistralForCausalLM"], "architectures"),
        ("config.json", "quantization_config", None, "quantization_config"),
        ("tokenizer.json", "added_tokens", [], "tokenizer.json"),
    ],
)
def test_another_model_is_refused(monkeypatch, pair, capsys, file, key, value, named):
    path = pair / "w4a16" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert merge(monkeypatch, pair) == 2
    assert named in capsys.readouterr().err
    assert leftovers(pair) == []


def test_a_checkpoint_of_ours_is_not_merged_again(monkeypatch, pair, merged_dir, capsys):
    sets = (f"w8a8={merged_dir}", f"w4a16={pair / 'w4a16'}")
    assert command(monkeypatch, "merge", *sets, "-o", pair / "out") == 2
    assert f"vllm serve {merged_dir} --quantization qoq" in capsys.readouterr().err
    assert leftovers(pair) == []


@pytest.mark.parametrize("entry", ["../w8a8/model.safetensors", "/etc/passwd", "a\\b.safetensors"])
def test_an_index_that_leaves_the_folder_is_refused(monkeypatch, pair, capsys, entry):
    index = {"weight_map": dict.fromkeys(tensors(pair / "w8a8"), entry)}
    (pair / "w8a8" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert merge(monkeypatch, pair) == 2
    assert "model.safetensors.index.json" in capsys.readouterr().err


def test_a_truncated_file_is_refused(monkeypatch, pair, capsys):
    path = pair / "w8a8" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert merge(monkeypatch, pair) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_an_existing_output_is_kept_unless_told(monkeypatch, pair, capsys):
    (pair / "out").mkdir()
    (pair / "out" / "mine.txt").write_text("mine")
    assert merge(monkeypatch, pair) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert merge(monkeypatch, pair, "--overwrite") == 2
    assert "holds mine.txt" in capsys.readouterr().err
    assert (pair / "out" / "mine.txt").exists()
    (pair / "out" / "mine.txt").unlink()
    for _ in ("an empty folder", "a checkpoint of ours"):
        assert merge(monkeypatch, pair, "--overwrite") == 0
        assert leftovers(pair) == ["out"]


@pytest.mark.parametrize("out", ["w8a8", "w8a8/inside"])
def test_an_input_is_never_the_output(monkeypatch, pair, capsys, out):
    assert merge(monkeypatch, pair, "--overwrite", out=out) == 2
    assert "overlaps" in capsys.readouterr().err


def test_a_disk_that_fails_at_any_file_leaves_nothing(monkeypatch, pair, capsys):
    before = {name: tensors(pair / name) for name in ("w8a8", "w4a16")}
    sync, failures = os.fsync, 0
    for nth in range(1, 40):
        calls = iter(range(1, 1000))

        def failing(descriptor, nth=nth, calls=calls):
            if next(calls) == nth:
                raise OSError(28, "No space left on device")
            sync(descriptor)

        monkeypatch.setattr(writer.os, "fsync", failing)
        code = merge(monkeypatch, pair)
        monkeypatch.setattr(writer.os, "fsync", sync)
        if code == 0:
            break
        failures += 1
        # The very last sync comes after the rename: the output is complete then.
        assert leftovers(pair) in ([], ["out"])
        shutil.rmtree(pair / "out", ignore_errors=True)
    assert failures >= 8
    for name, weights in before.items():
        after = tensors(pair / name)
        assert all(torch.equal(after[tensor], value) for tensor, value in weights.items())


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_merge_leaves_no_output_and_the_next_one_clears_up(monkeypatch, pair, how):
    slow = (
        "import signal, sys, time\n"
        # A shell starts background jobs with SIGINT ignored, which children inherit.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from vllm_qoq.checkpoint import shards\n"
        "real = shards.write_shard\n"
        "def write_shard(*a):\n"
        "    print('writing', flush=True); time.sleep(300); real(*a)\n"
        "shards.write_shard = write_shard\n"
        "from merge_tools.__main__ import main\n"
        "sys.exit(main())\n"
    )
    sets = [f"{name}={pair / name}" for name in ("w8a8", "w4a16")]
    arguments = ["merge", *sets, "-o", str(pair / "out"), "-q"]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(how)
    code = process.wait(120)
    process.stdout.close()
    if how is signal.SIGKILL:
        assert leftovers(pair) == [".out.partial"]
    else:
        assert code == 130
        assert leftovers(pair) == []
    time.sleep(0.1)
    assert merge(monkeypatch, pair) == 0
    assert leftovers(pair) == ["out"]


@pytest.mark.parametrize("module", ["merge_tools", "vllm_qoq.cli"])
def test_help_imports_neither_torch_nor_vllm(module):
    code = (
        "import sys, runpy\n"
        "try: runpy.run_module(sys.argv.pop(1), run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, module, "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
