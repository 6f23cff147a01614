"""`vllm-qoq import`: QServe's layouts read back exactly, and everything else refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATA
from qserve_checkpoints import (
    CONFIG,
    LINEARS,
    g128,
    model,
    packed_codes,
    plain_tensors,
    random_scale,
    two_levels,
)
from safetensors.torch import load_file, save_file

from vllm_qoq.cli import main as cli
from vllm_qoq.importer.qserve import PackedLayers
from vllm_qoq.importer.source import open_packed
from vllm_qoq.numerics.reference import dequantize

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def place(tmp_path):
    """A folder with the base model; the source goes to `src`, the output to `out`."""
    (tmp_path / "base").mkdir()
    (tmp_path / "src").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    return tmp_path


def per_channel(n: int, k: int):
    codes, scale = torch.randint(0, 16, (n, k)), random_scale(n)
    zero = (torch.rand(n) * 0.1).half()
    leaves = {"qweight": packed_codes(codes), "s1_scales": scale, "s1_szeros": zero}
    return leaves, codes * scale.float()[:, None] - zero.float()[:, None]


def w8a8(n: int, k: int):
    codes, scale = torch.randint(-127, 128, (n, k), dtype=torch.int8), random_scale(n)
    return {"weight": codes, "dequant_scale": scale}, codes * scale.float()[:, None]


@pytest.fixture(scope="module")
def grouped():
    return model(g128)


@pytest.fixture
def run(place, monkeypatch, capsys):
    """Run the command on `src`: exit code, and the JSON report or the error."""

    def command(*options: str):
        paths = (place / "src", "-o", place / "out", "--base", place / "base")
        argv = ["vllm-qoq", "import", *map(str, paths), "--json", *options]
        monkeypatch.setattr(sys, "argv", argv)
        code = cli.main()
        out, err = capsys.readouterr()
        return code, json.loads(out) if code == 0 else err

    return command


def verifies(place, monkeypatch) -> bool:
    monkeypatch.setattr(sys, "argv", ["vllm-qoq", "verify", str(place / "out"), "-q"])
    return cli.main() == 0


def imported(place, layer: str, name: str) -> dict[str, torch.Tensor]:
    """Leaf -> tensor of a layer of the output."""
    tensors = {}
    for file in (place / "out").glob("*.safetensors"):
        tensors |= load_file(file)
    prefix = f"{name}.{layer}."
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def assert_weights(place, weights: dict[str, torch.Tensor]) -> None:
    for layer, weight in weights.items():
        assert torch.equal(dequantize(imported(place, layer, "w4a8")), weight), layer


def assert_refused(place, result, *words: str) -> None:
    """Exit code 2, a message with `words`, and nothing written."""
    code, error = result
    assert code == 2
    for word in words:
        assert word in error
    assert "Traceback" not in error
    assert sorted(item.name for item in place.iterdir()) == ["base", "src"]


def layer_of_fixture(tmp_path, kind: str):
    """A layer that QServe's own code packed, and what is known of it."""
    found = load_file(DATA / "qserve_layout.safetensors")
    known = {k.partition(".")[2]: v for k, v in found.items() if k.startswith(f"{kind}.")}
    leaves = ("qweight", "s1_scales", "s1_szeros", "s2_scales", "s2_zeros")
    save_file({f"x.{k}": v for k, v in known.items() if k in leaves}, tmp_path / "x.safetensors")
    layers = PackedLayers(open_packed(tmp_path), "g128" if kind == "g128" else "channel", None)
    tensors = layers.check("x")
    layers.settle()
    return tensors | layers.weights("x"), known


def test_qserves_own_g128_layer_is_read_exactly(tmp_path):
    tensors, known = layer_of_fixture(tmp_path, "g128")
    assert torch.equal(dequantize(tensors), known["weight"])


def test_qserves_own_per_channel_layer_is_read_exactly(tmp_path):
    tensors, known = layer_of_fixture(tmp_path, "per_channel")
    scale, zero = (known[x].float()[:, None] for x in ("s1_scales", "s1_szeros"))
    assert torch.equal(dequantize(tensors), known["codes"] * scale - zero)
    # QServe rounded zero * scale to float16; the packed weight is not in the file any more
    rounding = zero.abs() * 2**-11 + 2**-24
    assert ((dequantize(tensors) - known["weight"]).abs() <= rounding).all()


def test_g128_checkpoint_as_bin(place, run, monkeypatch, grouped):
    tensors, weights = grouped
    torch.save(tensors, place / "src" / "pytorch_model.bin")
    code, report = run()
    assert code == 0 and report["format"] == "QoQ g128" and not report["s2_order_repaired"]
    assert verifies(place, monkeypatch)
    assert_weights(place, weights)
    config = json.loads((place / "out" / "config.json").read_text())
    section = config.pop("quantization_config")
    assert section["sets"] == {
        "w4a8": {"quant_method": "qoq_linear", "group_size": 128, "ignore": ["lm_head"]}
    }
    assert section["routing"] == {"prefill": "w4a8", "decode": [{"set": "w4a8"}]}
    assert section["kv_cache"] == {"bits": 4}
    expected = {k: v for k, v in CONFIG.items() if k != "torch_dtype"}
    assert config == expected | {"dtype": "float16", "tie_word_embeddings": False}
    assert (place / "out" / "tokenizer.json").exists()
    assert len(report["shards"]) == 2


def test_zeros_that_wrap_are_in_the_test(grouped):
    tensors, _ = grouped
    assert any((v > 0).any() for k, v in tensors.items() if k.endswith("s2_zeros"))


def test_per_channel_checkpoint_as_shards_of_safetensors(place, run, monkeypatch):
    tensors, weights = model(per_channel)
    names = sorted(tensors)
    for i in range(2):
        save_file({k: tensors[k] for k in names[i::2]}, place / "src" / f"{i}.safetensors")
    code, report = run("--kv-bits", "8")
    assert code == 0 and report["quantization_config"]["kv_cache"] == {"bits": 8}
    assert report["quantization_config"]["sets"]["w4a8"]["group_size"] == -1
    assert verifies(place, monkeypatch)
    assert_weights(place, weights)
    found = load_file(place / "out" / "model-00001-of-00002.safetensors")
    assert all(torch.equal(found[name], value) for name, value in plain_of(tensors).items())


def plain_of(tensors):
    return {k: v for k, v in tensors.items() if "_proj" not in k}


def test_w8a8_checkpoint_becomes_a_compressed_tensors_set(place, run, monkeypatch):
    tensors, weights = model(w8a8)
    torch.save(tensors, place / "src" / "pytorch_model.bin")
    code, report = run()
    config = report["quantization_config"]["sets"]["w8a8"]
    group = config["config_groups"]["group_0"]
    assert code == 0 and config["format"] == "int-quantized"
    assert group["weights"]["strategy"] == "channel"
    assert group["input_activations"]["dynamic"] is True
    assert verifies(place, monkeypatch)
    for layer, weight in weights.items():
        leaves = imported(place, layer, "w8a8")
        assert leaves["weight"].dtype == torch.int8
        assert leaves["weight_scale"].shape == (weight.shape[0], 1)
        assert torch.equal(leaves["weight"] * leaves["weight_scale"], weight)


def test_biases_keep_their_name(place, run, monkeypatch):
    config = CONFIG | {"architectures": ["Qwen2ForCausalLM"]}
    (place / "base" / "config.json").write_text(json.dumps(config))
    tensors, _ = model(per_channel)
    for layer, (n, _) in LINEARS.items():
        if layer.endswith(("q_proj", "k_proj", "v_proj")):
            tensors[f"{layer}.bias"] = torch.randn(n).half()
    save_file(tensors, place / "src" / "model.safetensors")
    assert run()[0] == 0 and verifies(place, monkeypatch)
    layer = "model.layers.1.self_attn.k_proj"
    assert torch.equal(imported(place, layer, "w4a8")["bias"], tensors[f"{layer}.bias"])


def test_deepcompressors_order_is_found_repaired_and_reported(place, run, monkeypatch):
    tensors, weights = model(lambda n, k: g128(n, k, "deepcompressor"))
    # one layer that makes sense in both orders must follow the others
    leaves, weights[LAYER] = g128(*LINEARS[LAYER], "deepcompressor", is_ambiguous=True)
    tensors |= {f"{LAYER}.{leaf}": value for leaf, value in leaves.items()}
    torch.save(tensors, place / "src" / "quant_model.pt")
    code, report = run()
    assert code == 0 and report["s2_order_repaired"]
    assert any("13 of 14 layers prove" in note for note in report["notes"])
    assert "deepcompressor" in (place / "out" / "README.md").read_text()
    assert verifies(place, monkeypatch)
    assert_weights(place, weights)


@pytest.mark.parametrize("order", ["qserve", "deepcompressor"])
def test_where_both_orders_make_sense_the_user_decides(place, run, order):
    tensors, weights = model(lambda n, k: g128(n, k, order, is_ambiguous=True))
    torch.save(tensors, place / "src" / "pytorch_model.bin")
    code, report = run(*(["--s2-order", order] if order == "deepcompressor" else []))
    assert code == 0 and ("which no layer proves" in str(report["notes"])) == (order == "qserve")
    assert_weights(place, weights)


def test_an_order_that_the_numbers_refute_is_refused(place, run, grouped):
    torch.save(grouped[0], place / "src" / "pytorch_model.bin")
    assert_refused(place, run("--s2-order", "deepcompressor"), "s2_scales", "--s2-order")


def test_layers_in_different_orders_are_refused(place, run, grouped):
    leaves, _ = g128(*LINEARS[LAYER], "deepcompressor")
    tensors = grouped[0] | {f"{LAYER}.{leaf}": value for leaf, value in leaves.items()}
    torch.save(tensors, place / "src" / "pytorch_model.bin")
    assert_refused(place, run(), f"{LAYER}.s2_scales")


def test_a_layer_that_makes_sense_in_no_order_is_refused(place, run, grouped):
    torch.manual_seed(1)
    zeros = torch.randint(-128, 128, grouped[0][f"{LAYER}.s2_zeros"].shape, dtype=torch.int8)
    torch.save(grouped[0] | {f"{LAYER}.s2_zeros": zeros}, place / "src" / "pytorch_model.bin")
    assert_refused(place, run(), f"{LAYER}.s2_zeros")


def test_static_kv_scales_are_dropped_and_said(place, run, grouped):
    scales = {f"model.layers.{i}.self_attn.kv_scale_quant_orig": torch.rand(2) for i in range(2)}
    torch.save(grouped[0] | scales, place / "src" / "pytorch_model.bin")
    code, report = run()
    assert code == 0 and report["dropped"] == sorted(scales)
    assert "kv_scale_quant_orig" in (place / "out" / "README.md").read_text()


@pytest.mark.parametrize("is_stored", [True, False])
def test_an_equal_or_absent_lm_head_stays_tied(place, run, monkeypatch, grouped, is_stored):
    tensors = grouped[0] | {"lm_head.weight": grouped[0]["model.embed_tokens.weight"].clone()}
    if not is_stored:
        del tensors["lm_head.weight"]
    save_file(tensors, place / "src" / "model.safetensors")
    assert run()[0] == 0 and verifies(place, monkeypatch)
    assert json.loads((place / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def raw(kind: str, n: int, k: int):
    """model.pt's weight, its entries of scale.pt, and the weight of the exact numbers."""
    if kind == "w8a8":
        leaves, weight = w8a8(n, k)
        return weight, {"scale.0": leaves["dequant_scale"].view(n, 1, 1, 1), "zero": None}
    domain = "scaled_zero" if "post" in kind else "zero"
    if kind.startswith("g"):
        group_size = int(kind.split()[0][1:])
        parts = two_levels(n, k, group_size=group_size)
        zero = parts["zero"] * parts["scale"] if domain == "scaled_zero" else parts["zero"]
        zero = zero - (8 * parts["scale"] if "signed post" in kind else 8 * ("signed" in kind))
        shape = (n, 1, k // group_size, 1)
        return parts["weight"], {
            "scale.0": parts["channel"].view(n, 1, 1, 1),
            "scale.1": parts["scale"].view(shape).half(),
            domain: zero.view(shape).half(),
        }
    codes, scale = torch.randint(0, 16, (n, k)), random_scale(n).view(n, 1)
    codes[:, 0] = 0  # so that signed codes show in every layer
    if domain == "scaled_zero":
        zero = (torch.rand(n, 1) * 0.1).half()
        weight = codes * scale.float() - zero.float()
    else:
        zero = torch.randint(0, 16, (n, 1))
        weight = (codes - zero) * scale.float()
        zero = zero - 8 * ("signed" in kind)
    return weight, {"scale.0": scale.view(n, 1, 1, 1), domain: zero.view(n, 1, 1, 1)}


RAW = ["g128", "g128 post", "g128 signed", "g128 signed post", "g64 post", "g32 signed"]
RAW += ["channel", "channel post", "channel signed"]


def write_raw(place, kind: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    tensors, scales, weights = plain_tensors(), {}, {}
    for layer, shape in LINEARS.items():
        weights[layer], entries = raw(kind, *shape)
        tensors[f"{layer}.weight"] = weights[layer].half()
        scales |= {f"{layer}.weight.{leaf}": value for leaf, value in entries.items()}
    torch.save(tensors, place / "src" / "model.pt")
    torch.save(scales, place / "src" / "scale.pt")
    return weights


@pytest.mark.parametrize("kind", RAW)
def test_raw_output_of_deepcompressor(place, run, monkeypatch, kind):
    weights = write_raw(place, kind)
    code, report = run()
    assert code == 0 and report["format"] == (
        f"QoQ {kind.split()[0]}" if kind.startswith("g") else "QoQ per channel"
    )
    assert verifies(place, monkeypatch)
    assert_weights(place, weights)


@pytest.mark.parametrize("size", [64, 32])
def test_packed_groups_of_another_size_are_read(place, run, monkeypatch, size):
    tensors, weights = model(lambda n, k: g128(n, k, group_size=size))
    save_file(tensors, place / "src" / "model.safetensors")
    code, report = run()
    assert code == 0 and report["format"] == f"QoQ g{size}"
    assert report["quantization_config"]["sets"]["w4a8"]["group_size"] == size
    assert verifies(place, monkeypatch)
    assert_weights(place, weights)


def test_layers_in_groups_of_different_sizes_are_refused(place, run):
    tensors, _ = model(g128)
    leaves, _ = g128(*LINEARS[LAYER], group_size=64)
    tensors |= {f"{LAYER}.{leaf}": value for leaf, value in leaves.items()}
    save_file(tensors, place / "src" / "model.safetensors")
    assert_refused(place, run(), f"{LAYER}.s2_", "expected I8")


def test_raw_groups_of_a_size_that_there_is_not_are_refused(place, run):
    write_raw(place, "g16")
    assert_refused(place, run(), "groups of 16 inputs", "only groups of 128, 64, 32")


def test_raw_w8a8_output_of_deepcompressor(place, run, monkeypatch):
    weights = write_raw(place, "w8a8")
    assert run()[0] == 0 and verifies(place, monkeypatch)
    for layer, weight in weights.items():
        leaves = imported(place, layer, "w8a8")
        assert torch.equal(leaves["weight"] * leaves["weight_scale"], weight)


@pytest.mark.parametrize("kind", ["g128", "channel post", "w8a8"])
def test_raw_weights_that_their_scales_do_not_give_are_refused(place, run, kind):
    write_raw(place, kind)
    tensors = torch.load(place / "src" / "model.pt", weights_only=True)
    tensors[f"{LAYER}.weight"][5, 7] += 0.001
    torch.save(tensors, place / "src" / "model.pt")
    assert_refused(place, run(), f"model.pt: {LAYER}.weight", "row 5, column 7")


def test_raw_output_without_its_scales_is_refused(place, run):
    write_raw(place, "g128")
    scales = torch.load(place / "src" / "scale.pt", weights_only=True)
    del scales[f"{LAYER}.weight.zero"]
    torch.save(scales, place / "src" / "scale.pt")
    assert_refused(place, run(), f"scale.pt: {LAYER}.weight.")
    (place / "src" / "scale.pt").unlink()
    assert_refused(place, run(), "scale.pt")


def changed(name: str, change):
    def apply(tensors):
        tensors[name] = change(tensors[name].clone())

    return name, apply


def with_value(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


def lost(name: str):
    return name, lambda tensors: tensors.pop(name)


def added(name: str, value: torch.Tensor):
    return name, lambda tensors: tensors.update({name: value})


DAMAGE = {
    "a lost weight": lost(f"{LAYER}.qweight"),
    "a lost scale": lost(f"{LAYER}.s1_scales"),
    "a lost norm": lost("model.layers.0.input_layernorm.weight"),
    "a lost embedding": lost("model.embed_tokens.weight"),
    "a layer too many": added("model.layers.2.input_layernorm.weight", torch.ones(256).half()),
    "an unexpected bias": added(f"{LAYER}.bias", torch.zeros(384).half()),
    "another format": added(f"{LAYER}.s1_szeros", torch.zeros(384).half()),
    "an infinite scale": changed(f"{LAYER}.s1_scales", with_value(3, float("inf"))),
    "a NaN in a norm": changed("model.norm.weight", with_value(3, float("nan"))),
    "a number beyond float16": changed("model.norm.weight", lambda t: t.float() * 1e6),
    "a negative scale": changed(f"{LAYER}.s1_scales", with_value(3, -0.01)),
    "a zero scale": changed(f"{LAYER}.s1_scales", with_value(3, 0)),
    "a zero group scale": changed(f"{LAYER}.s2_scales", with_value((0, 3), 0)),
    "a large group scale": changed(f"{LAYER}.s2_scales", with_value((0, 3), 17)),
    "a wrong dtype": changed(f"{LAYER}.qweight", lambda t: t.to(torch.int16)),
    "a wrong shape": changed(f"{LAYER}.qweight", lambda t: t[:, :64].contiguous()),
    "a wrong vocabulary": changed("lm_head.weight", lambda t: t[:64].contiguous()),
    "another group size": changed(f"{LAYER}.s2_scales", lambda t: t.repeat(2, 1)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_name(place, run, grouped, damage):
    name, apply = DAMAGE[damage]
    tensors = dict(grouped[0])
    apply(tensors)
    torch.save(tensors, place / "src" / "pytorch_model.bin")
    assert_refused(place, run(), name)


@pytest.mark.parametrize("share", [0.5, 0])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_a_file_cut_short_is_refused(place, run, grouped, file, share):
    path = place / "src" / file
    save = torch.save if file.endswith("bin") else save_file
    save(grouped[0], path)
    os.truncate(path, int(path.stat().st_size * share))
    assert_refused(place, run(), file, "; the file is damaged")


def test_another_base_model_is_refused(place, run, grouped):
    torch.save(grouped[0], place / "src" / "pytorch_model.bin")
    (place / "base" / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 3}))
    assert_refused(place, run(), "model.layers.2.", "--base")
    (place / "base" / "config.json").write_text(json.dumps(CONFIG | {"intermediate_size": 400}))
    assert_refused(place, run(), "model.layers.0.mlp.gate_proj.qweight", "--base")
    (place / "base" / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["X"]}))
    assert_refused(place, run(), "architectures", "LlamaForCausalLM")


class Canary:
    """Pickled, it makes a file when it is loaded by a loader that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "scale.pt"])
def test_code_in_a_pickle_does_not_run(place, run, grouped, file, is_zip):
    if file != "pytorch_model.bin":
        write_raw(place, "g128")
    content = {"x": torch.zeros(1), "canary": Canary(place / "canary")}
    path = place / "src" / file
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    assert_refused(place, run(), file)
    if is_zip:
        assert "mkdir" in run()[1] and "weights_only" not in run()[1]


def test_pickles_of_other_things_are_refused(place, run):
    for content in (
        [torch.zeros(1)],
        {"x": 1},
        {1: torch.zeros(1)},
        {"x": torch.eye(2).to_sparse()},
    ):
        torch.save(content, place / "src" / "pytorch_model.bin")
        assert_refused(place, run(), "pytorch_model.bin")


def test_a_full_disk_leaves_nothing_behind(place, run, grouped, monkeypatch):
    torch.save(grouped[0], place / "src" / "pytorch_model.bin")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_qoq.checkpoint.writer.os.fsync", full)
    assert_refused(place, run(), "No space left")


def test_the_source_may_be_the_base_and_people_get_a_summary(place, monkeypatch, capsys, grouped):
    torch.save(grouped[0], place / "base" / "pytorch_model.bin")
    paths = (place / "base", "-o", place / "out", "--base", place / "base")
    monkeypatch.setattr(sys, "argv", ["vllm-qoq", "import", *map(str, paths)])
    assert cli.main() == 0
    out, err = capsys.readouterr()
    assert "QoQ g128, 14 layers" in out and "check values" in err
    assert not (place / "out" / "pytorch_model.bin").exists()


def test_dry_run_and_overwrite(place, run, grouped):
    torch.save(grouped[0], place / "src" / "pytorch_model.bin")
    code, report = run("--dry-run")
    assert code == 0 and report["dry_run"] and not (place / "out").exists()
    (place / "out").mkdir()
    (place / "out" / "mine").touch()
    assert run()[0] == 2 and (place / "out" / "mine").exists()
    assert run("--overwrite")[0] == 2 and (place / "out" / "mine").exists()
    (place / "out" / "mine").unlink()
    assert run("--overwrite")[0] == 0 and run("--overwrite")[0] == 0


def test_help_needs_no_torch():
    program = (
        "import sys\n"
        "from vllm_qoq.cli.main import main\n"
        "sys.argv = ['vllm-qoq', 'import', '--help']\n"
        "try:\n    main()\n"
        "finally:\n    assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
