"""Random damage to whole checkpoints, with a fixed seed: each command takes them or says why not.

Refusals are one line on stderr, with status 2; nothing is left where the output would be.
"""

import json
import random
import shutil
import struct

import pytest
import rtn_checkpoints
from conftest import DATA
from qoq_checkpoints import write_nested, write_plain
from qserve_checkpoints import CONFIG as QSERVE_CONFIG
from qserve_checkpoints import g128
from qserve_checkpoints import model as qserve_model
from safetensors.torch import save_file

from vllm_qoq.cli import main as cli

MODEL = DATA / "tiny-llama"
VALUES = (
    *(None, True, False, 0, 1, -1, 3, 64, 128, 2**31, 10**40, 0.5, float("nan"), float("inf"), ""),
    *("x", "\ud800", "\x1b[31m", "y" * 9999, "re:(a+)+$", "re:[", "*", [], [1], ["x"], [None], {}),
    *({"a": 1}, {"": {}}, ["q"] * 9, "qoq", "gptq", "awq", "fp8", "compressed-tensors", "modelopt"),
)
KEYS = (
    *("quantization_config", "text_config", "architectures", "model_type", "head_dim", "dtype"),
    *("bits", "group_size", "desc_act", "dynamic", "ignore", "config_groups", "quant_method"),
    *("sets", "routing", "stream", "kv_cache", "lm_head", "input_ratio", "kv_cache_scheme"),
    *("modules_to_not_convert", "layer_types", "num_key_value_heads", "tie_word_embeddings"),
)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F4", 5, None)
BYTES = (b"\xff" * 4, b"\x80\x7f\x80\x7f", bytes(4), b"\x80\xff\x80\xff")
STRAY = (b"", b"{}", b"[]", b"\xff\xfe", b"[" * 99_999, b'{"a": ' + b"9" * 5000 + b"}")
OTHER_FILES = (
    *("generation_config.json", "chat_template.json", "processor_config.json", "tokenizer.model"),
    *("hf_quant_config.json", "quantize_config.json", "model.safetensors.index.json"),
    *("model-00001-of-00002.safetensors", "pytorch_model.bin", "a\nb.json", "adapter_config.json"),
)


def damage(folder, chance):
    """Change one file of a checkpoint."""
    how = chance.random()
    if how < 0.45:
        file = folder / "config.json"
        file.write_bytes(_encoded(_changed(json.loads(file.read_text()), chance), chance))
    elif how < 0.85:
        file = folder / "model.safetensors"
        file.write_bytes(_header_changed(file.read_bytes(), chance))
    elif how < 0.95:
        (folder / chance.choice(OTHER_FILES)).write_bytes(chance.choice(STRAY))
    else:
        file = chance.choice(sorted(folder.iterdir()))
        file.unlink()
        if chance.random() < 0.5:
            file.symlink_to("nothing")
        else:
            file.mkdir()


def _changed(config, chance):
    for _ in range(chance.choice([1, 1, 2])):
        places = list(_places(config))
        where, key = chance.choice(places)
        if chance.random() < 0.2:
            del where[key]
        else:
            new = chance.choice(KEYS) if isinstance(where, dict) and chance.random() < 0.3 else key
            where[new] = chance.choice(VALUES)
    return config


def _places(value):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield value, key
        if isinstance(item, (dict, list)):
            yield from _places(item)


def _encoded(config, chance):
    text = json.dumps(config)
    spoiled = {
        0: text.encode("utf-16"),
        1: text.encode()[:-9],
        2: text[:-1].encode() + b',"x":1,"x":2}',
    }
    return spoiled.get(chance.randrange(40), text.encode())


def _header_changed(content, chance):
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    name = chance.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    match chance.randrange(6):
        case 0:
            del header[name]
        case 1:
            shape = entry["shape"]
            entry["shape"] = chance.choice([shape[::-1], [1, *shape], [], [0], [2**62, 4], "x"])
        case 2:
            entry["dtype"] = chance.choice(DTYPES)
        case 3:
            other = chance.choice(
                ["", "\x1b", "lm_head.weight", f"a.{name}", name.replace("0", "9")]
            )
            header[other] = header.pop(name)
        case 4:
            header[chance.choice([f"b.{name}", "v_head.weight", f"{name}_2"])] = dict(entry)
        case 5:
            start = entry["data_offsets"][0]
            data[start : start + 4] = chance.choice(BYTES)
    raw = json.dumps(header).encode()
    length = len(raw) if chance.random() < 0.95 else chance.choice([0, 2**40, 2**63])
    return struct.pack("<Q", length) + raw + data


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """One sound folder of each kind that a command reads."""
    folder = tmp_path_factory.mktemp("sound")
    rtn_checkpoints.w8a8(MODEL, folder / "w8a8")
    rtn_checkpoints.gptq(MODEL, folder / "gptq")
    rtn_checkpoints.awq(MODEL, folder / "awq")
    write_plain(MODEL, folder / "qoq")
    write_nested(MODEL, folder / "ours")
    for name in ("qserve", "base"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(QSERVE_CONFIG))
    (folder / "base" / "tokenizer.json").write_text("{}")
    save_file(qserve_model(g128)[0], folder / "qserve" / "model.safetensors")
    return folder


@pytest.fixture
def run(monkeypatch, capfd):
    """Run a command: whether it takes its input. Anything but a refusal in one line fails."""

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["vllm-qoq", *map(str, arguments)])
        code = cli.main()
        out, err = capfd.readouterr()
        assert code in (0, 1, 2), (code, err)
        if code == 2:
            assert out == "" and err.startswith("error: ") and err.count("\n") == 1, (out, err)
            assert 20 < len(err) < 2000, err
        elif "--json" in arguments:
            json.loads(out, parse_constant=pytest.fail)
        return code == 0

    return command


MERGES = {
    "two formats": ("a=w8a8", "b=gptq", "--dry-run"),
    "written": ("a=gptq", "b=awq"),
    "nested": ("w8a8=w8a8", "w4a8=qoq", "--nest", "--dry-run"),
}


@pytest.mark.parametrize("kind", MERGES)
def test_merge(sound, tmp_path, run, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ("merge", *MERGES[kind], "-o", "out", "--json")
    sources = [name.partition("=")[2] for name in MERGES[kind] if "=" in name]
    for name in sources:
        shutil.copytree(sound / name, name)
    assert run(*command, "--dry-run")
    chance, taken = random.Random(kind), 0
    for _ in range(25):
        name = chance.choice(sources)
        damage(tmp_path / name, chance)
        if run(*command):
            taken += 1
            assert kind != "written" or run("verify", "out", "-q")
        else:
            assert not (tmp_path / "out").exists()
        shutil.rmtree("out", ignore_errors=True)
        shutil.rmtree(name)
        shutil.copytree(sound / name, name)
    assert 0 < taken < 25


def test_inspect_and_verify(sound, tmp_path, run):
    chance, found = random.Random(0), {"inspect": 0, "verify": 0}
    for _ in range(40):
        shutil.copytree(sound / "ours", tmp_path / "ours", dirs_exist_ok=True)
        damage(tmp_path / "ours", chance)
        for command in found:
            found[command] += run(command, tmp_path / "ours", "--json")
        shutil.rmtree(tmp_path / "ours")
    assert 0 < found["verify"] <= found["inspect"] < 40


def test_import(sound, tmp_path, run):
    chance, taken = random.Random(0), 0
    command = ("import", tmp_path / "qserve", "--base", tmp_path / "base", "-o", tmp_path / "out")
    for _ in range(40):
        for name in ("qserve", "base"):
            shutil.copytree(sound / name, tmp_path / name)
        damage(tmp_path / "qserve", chance)
        if chance.random() < 0.5:
            config = json.loads((tmp_path / "base" / "config.json").read_text())
            changed = _encoded(_changed(config, chance), chance)
            (tmp_path / "base" / "config.json").write_bytes(changed)
        if run(*command, "--json"):
            taken += 1
            assert run("verify", tmp_path / "out", "-q")
        for folder in list(tmp_path.iterdir()):
            shutil.rmtree(folder)
    assert 0 < taken < 40


WORDS = (
    *("", ".", "..", "/", "/dev/null", "nope", "a/b", "~", "-1", "0", "1", "9" * 5000, "n" * 5000),
    *("w8a8", "a=ours", "b=ours", "=", "a=", "9:a,b", ":", "x\ny", "\x1b[31m", "5GB", "0.5", "nan"),
    *("--json", "-q", "--dry-run", "--nest", "--overwrite", "-o", "--text", "--routing", "--sets"),
    *("--decode", "--recipe", "--base", "--work-dir", "--kv-bits", "--samples", "--max-clipped"),
    *("--max-shard-size", "--force-set", "--", "--nope", "ours", "gone", "--prefill", "--seqlen"),
)


def test_command_lines(sound, tmp_path, monkeypatch, capfd):
    """Whatever is typed: one `error:` line at the end of stderr and status 2, or a result."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sound / "ours", "ours")
    chance = random.Random(0)
    for _ in range(200):
        command = chance.choice(["merge", "import", "inspect", "verify", "quantize", "perplexity"])
        words = [chance.choice(WORDS) for _ in range(chance.randrange(9))]
        monkeypatch.setattr("sys.argv", ["vllm-qoq", command, *words])
        try:
            code = cli.main()
        except SystemExit as end:
            code = end.code
        err = capfd.readouterr().err
        assert code in (0, 1, 2), (words, err)
        if code == 2:
            assert err.count("error: ") == 1 and "error: " in err.splitlines()[-1], (words, err)
            assert len(err.splitlines()[-1]) < 6000, words
