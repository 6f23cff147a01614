"""`verify` holds every tensor against config.json, and its output is short and fit to print."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from qoq_checkpoints import PER_CHANNEL, write_checkpoint, write_nested, write_plain
from safetensors.torch import load_file, save_file

from merge_tools.__main__ import main
from vllm_qoq.checkpoint import inspect, verify
from vllm_qoq.checkpoint.folder import INDEX
from vllm_qoq.errors import FormatError
from vllm_qoq.progress import Progress

UP, K = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def sound(tiny_model, tmp_path_factory):
    """A checkpoint of two nested sets and one of one set."""
    folder = tmp_path_factory.mktemp("verify")
    write_nested(tiny_model, folder / "nested")
    write_checkpoint(tiny_model, folder / "single")
    return folder


@pytest.fixture
def damaged(sound, tmp_path):
    """`damaged(CHANGE, name)`: the findings after CHANGE(config, tensors)."""

    def run(change, name="nested"):
        folder = Path(shutil.copytree(sound / name, tmp_path / name))
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        change(config, tensors)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        assert not (folder / INDEX).exists()
        found = verify.structure(folder) + verify.contents(folder, Progress(quiet=True))
        return "\n".join(found)

    return run


@pytest.mark.parametrize("name", ["nested", "single"])
def test_a_sound_checkpoint_has_no_findings(damaged, name):
    assert damaged(lambda config, tensors: None, name) == ""


def test_means_that_are_announced_are_sound(damaged):
    def spared(config, tensors):
        announce(layers=(1,))(config, tensors)
        rules = [{"match": "model.layers.0.*", "bits": 16}]
        config["quantization_config"]["kv_cache"]["layers"] = rules

    assert damaged(announce(), "nested") == damaged(spared, "single") == ""


def cut(name, rows=-1):
    return lambda config, tensors: tensors.update({name: tensors[name][:rows].clone()})


def widen(name):
    return lambda config, tensors: tensors.update({name: torch.cat([tensors[name]] * 2, -1)})


def say(key, value):
    return lambda config, tensors: config.update({key: value})


def lose(name):
    return lambda config, tensors: tensors.pop(name)


def put(name, value):
    def change(config, tensors):
        tensors[name].view(-1)[3] = value

    return change


def add(name, tensor):
    return lambda config, tensors: tensors.update({name: tensor})


def narrow(name, columns):
    return lambda config, tensors: tensors.update({name: tensors[name][:, :columns].clone()})


def fewer_rows_in_all_leaves(config, tensors):
    for name in [name for name in tensors if name.startswith(f"w4a8.{UP}.")]:
        tensors[name] = tensors[name][:-8].clone()
    tensors[f"w8a8.{UP}.qresidual"] = tensors[f"w8a8.{UP}.qresidual"][:-8].clone()


KV_MEAN = "model.layers.1.self_attn.k_mean"


def announce(heads=2, size=64, layers=(0, 1), dtype=torch.float32):
    def change(config, tensors):
        config["quantization_config"]["kv_cache"] = {"bits": 4, "k_mean": True}
        for layer in layers:
            name = f"model.layers.{layer}.self_attn.k_mean"
            tensors[name] = torch.zeros(heads, size, dtype=dtype)

    return change


def with_infinity(config, tensors):
    announce()(config, tensors)
    tensors[KV_MEAN][0, 0] = float("inf")


def with_a_huge_mean(config, tensors):
    announce()(config, tensors)
    tensors[KV_MEAN][0, 0] = -3e38


DAMAGE = {
    "a mean beyond 16-bit floats": (with_a_huge_mean, (KV_MEAN, "holds 3e+38, beyond the 65504")),
    "a mean that is not announced": (
        add(KV_MEAN, torch.zeros(2, 64)),
        (KV_MEAN, "is not announced", '"k_mean": true', "kv_cache"),
    ),
    "a lost mean": (announce(layers=(0,)), (f"{KV_MEAN}: config.json announces it",)),
    "a mean of other heads": (announce(heads=4), (KV_MEAN, "is F32 [4, 64], expected F32 [2, 64]")),
    "a mean of half a head": (announce(size=32), (KV_MEAN, "[2, 32], expected F32 [2, 64]")),
    "a mean in bf16": (announce(dtype=torch.bfloat16), (KV_MEAN, "is BF16 [2, 64], expected F32")),
    "a mean beyond the layers": (
        announce(layers=(0, 1, 2)),
        ("model.layers.2.self_attn.k_mean: the model has no such layer",),
    ),
    "an infinite mean": (with_infinity, (KV_MEAN, "NaN or infinity")),
    "embedding, rows": (cut(EMBEDDING), ("is [1023, 256]", "[1024, 256] (vocab_size, hidden_")),
    "embedding, columns": (widen(EMBEDDING), (EMBEDDING, "is [1024, 512]")),
    "lm_head": (cut(HEAD), (HEAD, "is [1023, 256]")),
    "final norm": (cut(NORM), (NORM, "is [255]", "[256] (hidden_size)")),
    "a norm": (widen("model.layers.1.input_layernorm.weight"), ("is [512]", "[256]")),
    "rows of a layer": (fewer_rows_in_all_leaves, (UP, "is [760, 256]", "intermediate_size")),
    "fewer rows of codes": (
        cut(f"w4a8.{UP}.qweight"),
        (f"w4a8.{UP}.qweight: is U8 [767, 128], expected 768 rows, as channel_scale, group_scale",),
    ),
    "fewer columns of codes": (
        narrow(f"w4a8.{UP}.qweight", 64),
        (f"{UP}.qweight: is U8 [768, 64], expected 2 groups of columns, as group_scale, group_o",),
    ),
    "fewer scales": (
        cut(f"w4a8.{UP}.channel_scale"),
        (f"{UP}.channel_scale: is F32 [767], expected F32 [768]",),
    ),
    "hidden_size": (say("hidden_size", 512), ("[1024, 256]", "[1024, 512]")),
    "vocab_size": (say("vocab_size", 1000), (EMBEDDING, HEAD, "[1000, 256]")),
    "intermediate_size": (say("intermediate_size", 1024), (UP, "[1024, 256]")),
    "num_attention_heads": (say("num_attention_heads", 8), ("q_proj", "[512, 256]")),
    "num_key_value_heads": (say("num_key_value_heads", 4), ("k_proj", "[256, 256]")),
    "head_dim": (say("head_dim", 32), ("q_proj", "[128, 256]")),
    "fewer layers": (say("num_hidden_layers", 1), ("model.layers.1", "num_hidden_layers = 1")),
    "more layers": (say("num_hidden_layers", 3), ("model.layers.2: has no tensors",)),
    "biases": (say("attention_bias", True), (f"{K}.bias: missing",)),
    "tied": (say("tie_word_embeddings", True), (HEAD, "differs from", "tie_word_embeddings")),
    "another architecture": (
        say("architectures", ["Qwen3ForCausalLM"]),
        ("self_attn.q_norm: missing",),
    ),
    "no epsilon": (say("rms_norm_eps", "1e-5"), ("rms_norm_eps: '1e-5' is not a number",)),
    "an infinite theta": (
        say("rope_parameters", {"rope_type": "default", "rope_theta": float("inf")}),
        ("rope_parameters.rope_theta: inf is not a positive number",),
    ),
    "no context": (say("max_position_embeddings", 0), ("max_position_embeddings: 0 is not",)),
    "a lost norm": (lose(NORM), (f"{NORM}: missing",)),
    "a lost head": (lose(HEAD), (f"{HEAD}: missing",)),
    "a surplus tensor": (add("v_head.weight", torch.zeros(1, 256)), ("v_head.weight", "no such")),
    "a surplus bias": (add(f"w8a8.{UP}.bias", torch.ones(768)), (f"{UP}.bias", "not zero")),
    "integers in a norm": (
        lambda config, tensors: tensors.update({NORM: tensors[NORM].int()}),
        (NORM, "is I32"),
    ),
    "NaN scale": (put(f"w4a8.{UP}.channel_scale", float("nan")), (f"{UP}.channel_scale", "NaN")),
    "infinite scale": (put(f"w4a8.{UP}.channel_scale", float("inf")), ("channel_scale", "infin")),
    "zero scale": (put(f"w4a8.{UP}.channel_scale", 0), ("channel_scale", "not positive")),
    "negative scale": (put(f"w4a8.{K}.channel_scale", -1), (f"{K}.channel_scale", "not positive")),
    "infinite norm": (put(NORM, float("inf")), (NORM, "infinity")),
    "NaN embedding": (put(EMBEDDING, float("nan")), (EMBEDDING, "NaN")),
    "out of range": (put(f"w4a8.{K}.group_offset", 127), (f"{K}.group_offset",)),
    "a group scale of 0": (put(f"w4a8.{UP}.group_scale", 0), (f"{UP}.group_scale",)),
}


@pytest.mark.parametrize(("change", "named"), DAMAGE.values(), ids=DAMAGE)
def test_what_contradicts_is_named_with_both_values(damaged, change, named):
    found = damaged(change)
    assert all(part in found for part in named), found


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "intermediate_size"])
def test_an_architecture_that_is_not_known_is_checked_as_far_as_names_tell(damaged, key, tmp_path):
    def change(config, tensors):
        config |= {"architectures": ["SomethingForCausalLM"], key: config[key] * 2}

    assert "but config.json says" in damaged(change)
    (note,) = verify.notes(tmp_path / "nested")
    assert "SomethingForCausalLM" in note and "consistency" in note


def test_a_model_of_which_only_the_kv_cache_is_quantized_is_verified_and_shown(
    tiny_model, tmp_path
):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "kv"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "qoq", "kv_cache": {"bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    assert verify.structure(folder) + verify.contents(folder, Progress(quiet=True)) == []
    assert "KV cache: 4 bits" in inspect.table(inspect.inspect(folder))
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    assert len(verify.structure(folder)) == 2


@pytest.mark.parametrize(
    ("kv_cache", "layers", "said"),
    [
        ({"bits": 4, "k_mean": True}, (0, 1), ["4 bits, keys without their mean"]),
        (
            {"bits": 16, "k_mean": True},
            (0, 1),
            ["16 bits", "2 means .* kv_bits 4, k8v4 or 8 uses them"],
        ),
        (None, (0, 1), ["16 bits, none is asked for", "2 means .* not announced in config.json"]),
        ({"bits": 4}, (1,), ["4 bits", "1 means .* no server takes .* `vllm-qoq verify`"]),
        ({"bits": 4, "k_mean": True}, (), ["4 bits, .*", "announces means .* files have none"]),
    ],
)
def test_inspect_says_which_means_there_are_and_whether_they_are_used(
    sound, tmp_path, kv_cache, layers, said
):
    folder = Path(shutil.copytree(sound / "single", tmp_path / "single"))
    config, tensors = json.loads((folder / "config.json").read_text()), {}
    announce(layers=layers)(config, tensors)
    config["quantization_config"]["kv_cache"] = kv_cache
    (folder / "config.json").write_text(json.dumps(config))
    save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")
    report = inspect.inspect(folder)
    assert report["k_means"] == len(layers)
    lines = inspect.table(report).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("KV cache"))
    found = [lines[at], *(line for line in lines[at + 1 :] if "means of K" in line)]
    assert len(found) == len(said)
    for line, expected in zip(found, said, strict=True):
        assert re.fullmatch(rf"(KV cache: )?.*{expected}.*", line), line


@pytest.mark.parametrize("look", [inspect.inspect, verify.verify])
def test_gguf_is_refused_with_what_to_do(tmp_path, look):
    file = tmp_path / "model.GGUF"
    file.write_bytes(b"GGUF")
    for given in (file, tmp_path):
        with pytest.raises(FormatError, match=r"model\.GGUF: is GGUF.*quantize .* -o OUT`"):
            look(given)


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["merge_tools", *map(str, arguments)])
        return main(), capsys.readouterr()

    return run


def edited(sound, tmp_path, **keys) -> Path:
    folder = Path(shutil.copytree(sound / "single", tmp_path / "edited"))
    config = json.loads((folder / "config.json").read_text())
    section = config["quantization_config"] | keys.pop("section", {})
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": section} | keys)
    )
    return folder


@pytest.mark.parametrize("count", [1000, 99_999, 10**9])
def test_a_lost_file_brings_few_lines_and_little_time(command, sound, tmp_path, count):
    folder = edited(
        sound,
        tmp_path,
        architectures=["SomethingForCausalLM"] if count % 2 else ["LlamaForCausalLM"],
        num_hidden_layers=count,
        layer_types=[f"kind {i}" for i in range(min(count, 99_999))],
    )
    code, printed = command("verify", folder, "-q")
    assert code == 1 and printed.out.count("\n") <= 23, printed.out[:2000]
    assert count > 1000 or "and 978 more" in printed.out


def test_hundreds_of_thousands_of_globs_are_refused(command, sound, tmp_path):
    rules = [{"match": f"model.layers.{i}.*x", "decode": "w4a8"} for i in range(300_000)]
    routing = {"prefill": "w4a8", "decode": "w4a8", "layers": rules}
    folder = edited(sound, tmp_path, section={"routing": routing})
    code, printed = command("verify", folder, "-q")
    assert code == 2 and "routing.layers" in printed.err and len(printed.err) < 1000


@pytest.mark.parametrize("architectures", [[5], 5, None, {}, "x", ["\x1b[31mred\x1b]0;t\x07"]])
def test_inspect_survives_and_prints_nothing_that_a_terminal_obeys(
    command, sound, tmp_path, architectures
):
    code, printed = command("inspect", edited(sound, tmp_path, architectures=architectures))
    assert code == 0 and "w4a8" in printed.out
    assert "\x1b" not in printed.out and "\x07" not in printed.out


def test_inspect_shows_the_bits_of_kv_cache_and_head(command, sound, tmp_path):
    cache = {"bits": 4, "layers": [{"match": "model.layers.0.*", "bits": 16}], "hadamard": True}
    folder = edited(sound, tmp_path, section={"kv_cache": cache})
    _, printed = command("inspect", folder)
    assert "KV cache: 4 bits, keys rotated" in printed.out and "lm_head: 16 bits" in printed.out
    assert "layers model.layers.0.*: 16 bits" in printed.out
    _, printed = command("inspect", folder, "--json")
    assert json.loads(printed.out)["kv_cache"]["bits"] == 4
    (other := tmp_path / "mixed").mkdir()
    folder = edited(sound, other, section={"kv_cache": {"bits": "k8v4"}})
    assert command("verify", folder)[0] == 0
    assert "KV cache: k8v4" in command("inspect", folder)[1].out


def test_files_of_other_sets_come_along_and_code_and_links_do_not(command, tiny_model, tmp_path):
    a = write_plain(tiny_model, tmp_path / "a")
    b = write_plain(tiny_model, tmp_path / "b", PER_CHANNEL)
    c = write_plain(tiny_model, tmp_path / "c")
    (b / "additional_chat_templates").mkdir()
    (b / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (a / "modeling_tiny.py").write_text("code")
    config = json.loads((a / "config.json").read_text())
    for folder in (a, b, c):
        other = json.loads((folder / "config.json").read_text())
        config = other | {"auto_map": {"AutoConfig": "modeling_tiny.Config"}}
        (folder / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    sets = (f"a={a}", f"b={b}", f"c={c}", "-o", out, "-q")
    assert command("merge", *sets)[0] == 0
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    assert not (out / "modeling_tiny.py").exists()
    assert "auto_map" not in json.loads((out / "config.json").read_text())

    (c / "additional_chat_templates").mkdir()
    (c / "additional_chat_templates" / "tool_use.jinja").write_text("others")
    code, printed = command("merge", *sets, "--overwrite")
    assert code == 2 and "tool_use.jinja: differs" in printed.err
    shutil.rmtree(c / "additional_chat_templates")
    (tmp_path / "secret").write_text("secret")
    (c / "notes.txt").symlink_to(tmp_path / "secret")
    code, printed = command("merge", *sets, "--overwrite")
    assert code == 2 and "notes.txt: is a symbolic link" in printed.err
