"""Sets in the formats of other tools: which layers each leaves out, and what cannot be a set."""

import json

import pytest
import torch
from rtn_checkpoints import awq, edit, gptq, read, w8a8
from safetensors.torch import load_file

from merge_tools.__main__ import main
from vllm_qoq.checkpoint.methods import METHODS, Unit, parse

DOWN, ATTENTION_OUT = "layers.0.mlp.down_proj", "layers.1.self_attn.o_proj"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LAYER = "model.layers.0.mlp.down_proj"
QKV_UNIT = Unit(
    "model.layers.0.self_attn.qkv_proj", tuple(f"model.layers.0.{part}" for part in QKV)
)
DOWN_UNIT = Unit(LAYER, (LAYER,))


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory):
    """The 8-bit set that the others are merged with. Not to be edited."""
    return w8a8(tiny_model, tmp_path_factory.mktemp("base") / "w8a8")


@pytest.fixture
def merge(monkeypatch, base, tmp_path):
    """merge(FOLDER, OPTION...): the exit code; writes tmp_path / "out"."""

    def run(folder, *options, first=None) -> int:
        command = ["merge_tools", "merge", f"a8={first or base}", f"b4={folder}"]
        command += ["-o", str(tmp_path / "out"), "-q", *options]
        monkeypatch.setattr("sys.argv", command)
        return main()

    return run


@pytest.fixture
def command(monkeypatch):
    def run(*arguments) -> int:
        monkeypatch.setattr("sys.argv", ["merge_tools", *map(str, arguments)])
        return main()

    return run


def refused(capsys, *named) -> bool:
    message = capsys.readouterr().err
    assert all(part in message for part in named), message
    return message.startswith("error: ") and message.count("\n") == 1


SKIPPED = {
    "a rule of dynamic": (gptq, (DOWN,), {"dynamic": {r"-:.*layers\.0\.mlp\.down_proj": {}}}),
    "dynamic with an override": (
        gptq,
        (DOWN,),
        {"dynamic": {r"+:.*o_proj": {"bits": 4, "group_size": 128}, r"-:.*0\.mlp\.down.*": {}}},
    ),
    "dynamic and a fused layer": (
        gptq,
        [f"layers.0.{part}" for part in QKV],
        {"dynamic": {r"-:.*\.0\.self_attn\.[qkv]_proj": {}}},
    ),
    "GPTQ that says nothing": (gptq, (ATTENTION_OUT,), {}),
    "modules_in_block_to_quantize": (
        gptq,
        ("mlp.down_proj",),
        {"modules_in_block_to_quantize": [[*QKV], ["self_attn.o_proj"], ["gate_proj", "up_proj"]]},
    ),
    "AWQ by substring": (
        awq,
        (DOWN, ATTENTION_OUT),
        {"modules_to_not_convert": [DOWN, "1.self_attn.o_proj"]},
    ),
    "AWQ by block": (awq, ("layers.0.",), {"modules_to_not_convert": ["layers.0."]}),
    "AWQ that says nothing": (awq, (ATTENTION_OUT,), {"modules_to_not_convert": None}),
    "a name": (w8a8, (DOWN,), {}),
    "a pattern": (w8a8, (DOWN,), {"ignore": ["lm_head", r"re:.*layers\.0\..*down_proj$"]}),
    "a fused name": (
        w8a8,
        [f"layers.0.{part}" for part in QKV],
        {"ignore": ["model.layers.0.self_attn.qkv_proj"]},
    ),
    "auto-round": (
        gptq,
        (DOWN,),
        {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "extra_config": {LAYER: {"bits": 16, "data_type": "float"}},
        },
    ),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_layers_left_out_by_the_rule_of_the_format_are_plain_in_the_set(
    merge, command, tiny_model, tmp_path, case
):
    make, skip, changes = SKIPPED[case]
    source = make(tiny_model, tmp_path / "b4", skip, **changes)
    assert merge(source) == 0
    assert command("verify", tmp_path / "out", "-q") == 0
    plain = {
        f"b4.{name}"
        for name in read(source)[0]
        if name.endswith("_proj.weight") and any(part in name for part in skip)
    }
    merged = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        merged |= load_file(file)
    assert plain and plain <= merged.keys()
    original = load_file(tiny_model / "model.safetensors")
    assert all(torch.equal(merged[name], original[name.removeprefix("b4.")]) for name in plain)


CONTRADICTIONS = {
    "a quantized layer that dynamic leaves out": (gptq, (), {"dynamic": {r"-:.*down_proj": {}}}),
    "a plain layer that AWQ does not leave out": (awq, (DOWN,), {"modules_to_not_convert": ["o_"]}),
    "a plain layer that nobody leaves out": (w8a8, (DOWN,), {"ignore": ["lm_head"]}),
    "a module that is left out and quantized": (w8a8, (), {"ignore": ["re:.*down_proj"]}),
    "every module of a kind lost": (w8a8, ("mlp.down_proj",), {"ignore": ["lm_head"]}),
    "auto-round without the layer": (gptq, (DOWN,), {"quant_method": "auto-round"}),
    "a part of a fused layer": (awq, ("layers.0.self_attn.q_proj",), {}),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_set_whose_config_and_tensors_disagree_is_refused(
    merge, tiny_model, tmp_path, capsys, case
):
    make, skip, changes = CONTRADICTIONS[case]
    assert merge(make(tiny_model, tmp_path / "b4", skip, **changes)) == 2
    name = "self_attn.q_proj" if "fused" in case else "mlp.down_proj"
    assert refused(capsys, f"model.layers.0.{name}")
    assert not (tmp_path / "out").exists()


HOSTILE = [
    ("quant_method", "bitsandbytes", "'bitsandbytes' cannot be a set"),
    ("quant_method", "gguf", "compressed-tensors, gptq"),
    ("bits", [4], "quantization_config.bits"),
    ("bits", "4", "quantization_config.bits"),
    ("bits", True, "quantization_config.bits"),
    ("bits", 3, "3 is not 4 or 8"),
    ("group_size", "128", "quantization_config.group_size"),
    ("sym", False, "symmetric"),
    ("sym", None, "sym: missing"),
    ("dynamic", [1], "quantization_config.dynamic"),
    ("dynamic", {"-:(": {}}, "no regular expression"),
    ("dynamic", {"-:(a+)+$" * 200: {}}, "down_proj"),
    ("dynamic", {"-:" + "x" * 5000: {}}, "5000 characters"),
    ("dynamic", {f"-:{i}": {} for i in range(20_000)}, "20000 entries"),
    ("dynamic", {r"-:(?:.|.)+[A-Z]": {}}, "takes too long"),
    ("dynamic", {"+:.*down.*": {"bits": {}}}, "dynamic"),
    ("dynamic", {"+:.*q_proj": {"bits": 8}}, "vLLM runs it as model.layers.0.self_attn.qkv_proj"),
    ("modules_in_block_to_quantize", "down_proj", "modules_in_block_to_quantize"),
    ("modules_in_block_to_quantize", [[[1]]], "modules_in_block_to_quantize"),
]


@pytest.mark.parametrize(("key", "value", "named"), HOSTILE)
def test_a_config_of_wrong_types_is_refused(merge, tiny_model, tmp_path, capsys, key, value, named):
    if named == "down_proj":  # hard to compile, quick to match: nothing is wrong with it
        assert merge(gptq(tiny_model, tmp_path / "b4", **{key: value}), "--dry-run") == 0
        return
    assert merge(gptq(tiny_model, tmp_path / "b4", **{key: value})) == 2
    assert refused(capsys, named)


@pytest.mark.parametrize(
    "changes",
    [
        {"config_groups": [1]},
        {"config_groups": {"group_0": ["Linear"]}},
        {"config_groups": {"group_0": {"targets": "Linear"}}},
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": [8]}}}},
        {"config_groups": {"g": {"targets": ["Linear"], "weights": {"group_size": "128"}}}},
        {"config_groups": {}},
        {"ignore": "lm_head"},
        {"ignore": [8]},
        {"ignore": {"lm_head": 1}},
        {"sparsity_config": {"targets": ["Linear"]}},
    ],
)
def test_a_compressed_tensors_config_of_wrong_types_is_refused(
    merge, tiny_model, tmp_path, capsys, changes
):
    assert merge(w8a8(tiny_model, tmp_path / "b4", **changes)) == 2
    assert refused(capsys, f"quantization_config.{next(iter(changes))}")


def test_an_order_of_columns_that_vllm_does_not_read_is_refused(
    merge, tiny_model, tmp_path, capsys
):
    def shuffle(tensors, config):
        name = f"{LAYER}.g_idx"
        tensors[name] = tensors[name].flip(0)

    source = edit(gptq(tiny_model, tmp_path / "b4"), shuffle)
    assert merge(source) == 2
    assert refused(capsys, f"{LAYER}.g_idx", "desc_act")


@pytest.mark.parametrize(
    ("config", "unit", "expected"),
    [
        # GPTQ asks dynamic for the fused layer, and the headers for its parts.
        ({"quant_method": "gptq", "dynamic": {"-:.*q_proj": {}}}, QKV_UNIT, True),
        ({"quant_method": "gptq", "dynamic": {"-:.*qkv_proj": {}}}, QKV_UNIT, False),
        ({"quant_method": "gptq", "dynamic": {"-:down_proj": {}}}, DOWN_UNIT, True),
        ({"quant_method": "gptq", "dynamic": {"+:.*": {}, "-:.*down_proj": {}}}, DOWN_UNIT, True),
        ({"quant_method": "gptq", "modules_in_block_to_quantize": ["o_proj"]}, DOWN_UNIT, False),
        ({"quant_method": "awq", "modules_to_not_convert": ["down"]}, DOWN_UNIT, False),
        ({"quant_method": "awq", "modules_to_not_convert": ["self_attn"]}, QKV_UNIT, False),
        ({"quant_method": "fp8", "modules_to_not_convert": ["down_proj"]}, DOWN_UNIT, True),
        ({"quant_method": "fp8", "ignored_layers": [LAYER]}, DOWN_UNIT, False),
        ({"quant_method": "fp8", "ignored_layers": [*QKV_UNIT.parts]}, QKV_UNIT, False),
        ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": [LAYER]}, DOWN_UNIT, False),
        ({"quant_method": "quark", "exclude": ["re:.*down_proj"]}, DOWN_UNIT, False),
        ({"quant_method": "quark", "exclude": ["*down_proj"]}, DOWN_UNIT, True),
        ({"quant_method": "modelopt", "ignore": ["*down_proj"]}, DOWN_UNIT, False),
        (
            {"quant_method": "modelopt", "quantization": {"exclude_modules": ["layers.0"]}},
            DOWN_UNIT,
            False,
        ),
        (
            {"quant_method": "auto-round", "bits": 4, "extra_config": {".*qkv.*": {"bits": 16}}},
            QKV_UNIT,
            False,
        ),
        (
            {"quant_method": "auto-round", "bits": 4, "block_name_to_quantize": "model.layers"},
            DOWN_UNIT,
            True,
        ),
        (
            {"quant_method": "auto-round", "bits": 4, "block_name_to_quantize": ["model.blocks"]},
            DOWN_UNIT,
            False,
        ),
        (
            {
                "quant_method": "Compressed_Tensors",
                "config_groups": {"g": {"targets": ["re:.*self_attn.*"]}},
            },
            DOWN_UNIT,
            False,
        ),
    ],
)
def test_the_rule_is_vllms(config, unit, expected):
    assert parse(config).quantizes(unit, unit.parts) is expected


def test_a_rule_for_one_layer_gives_its_bits(merge, command, tiny_model, tmp_path, capsys):
    """Two methods in one GPTQ checkpoint: groups of 64 in one module."""

    def regroup(tensors, config):
        for index in range(2):
            layer = f"model.layers.{index}.mlp.down_proj"
            for leaf in ("scales", "qzeros"):
                tensors[f"{layer}.{leaf}"] = tensors[f"{layer}.{leaf}"].repeat_interleave(2, 0)
            order = tensors[f"{layer}.g_idx"]
            tensors[f"{layer}.g_idx"] = torch.arange(len(order), dtype=torch.int32) // 64

    rule = {"dynamic": {r"+:.*down_proj": {"group_size": 64}}}
    assert merge(edit(gptq(tiny_model, tmp_path / "b4", **rule), regroup)) == 0
    assert command("verify", tmp_path / "out", "-q") == 0
    assert merge(edit(gptq(tiny_model, tmp_path / "other"), regroup), "--overwrite") == 2
    assert refused(capsys, "mlp.down_proj.scales")


def test_every_method_is_one_that_vllm_has():
    """By its name or by the method that takes its checkpoints."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    from vllm_qoq.serving.methods.set_config import _OURS, _overridden

    for name in METHODS.keys() - _OURS.keys():
        assert name in QUANTIZATION_METHODS or _overridden({"quant_method": name}), name


def test_vllms_refusal_names_the_set(tiny_model):
    from vllm_qoq.errors import FormatError
    from vllm_qoq.serving.methods.set_config import set_config

    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": False}
    with pytest.raises(FormatError, match=r"sets\.w4: vLLM does not serve this gptq config"):
        set_config("w4", config)


def test_a_modelopt_config_in_its_own_file_is_read(command, tiny_model, base, tmp_path, capsys):
    def to_fp8(tensors, config):
        del config["quantization_config"]
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            scale = tensors[name.replace("weight", "weight_scale")]
            weight = tensors[name].float() * scale.float()
            one = weight.abs().max() / 448
            tensors[name] = (weight / one).to(torch.float8_e4m3fn)
            tensors[name.replace("weight", "weight_scale")] = one

    source = edit(w8a8(tiny_model, tmp_path / "fp8"), to_fp8)
    quantization = {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    path = source / "hf_quant_config.json"
    path.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": quantization}))
    arguments = ("merge", f"a8={base}", f"f8={source}", "-o", tmp_path / "out", "-q")
    assert command(*arguments) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["sets"]["f8"]["quant_method"] == "modelopt"
    quantization["kv_cache_quant_algo"] = "FP8"
    path.write_text(json.dumps({"quantization": quantization}))
    assert command(*arguments, "--overwrite") == 2
    assert refused(capsys, "kv_cache_quant_algo")
