"""Adapters in the basis of a quantized checkpoint: the algebra, and what is refused."""

import copy
import json
import re
import shutil
import sys

import pytest
import torch
from lora_adapters import products, write_adapter, write_config, write_transforms
from safetensors.torch import load_file, save, save_file
from transformed_models import SIZES, Model

import vllm_qoq
from vllm_qoq.checkpoint import transforms
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.checkpoint.transforms import Transforms
from vllm_qoq.cli import main as cli
from vllm_qoq.errors import UserError
from vllm_qoq.lora.basis import Basis
from vllm_qoq.quantizer import changes, rotate, smooth
from vllm_qoq.quantizer.model import blocks, layer_names

RANK = 3


def found_of(layers, heads, inner=256, linear=None):
    """What smoothing may find for a block; norms of all heads alike may have to take a scale.

    linear  heads of linear attention, and their size
    """
    found = {}
    if layers.has_keys:
        found["key_scale"] = (torch.rand(heads[1]) + 0.5).expand(heads)
        found["value_scale"] = torch.rand(heads) + 0.5
        found["k_mean"] = torch.randn(heads)
    else:
        found[f"{layers.o}.scale"] = (torch.rand(linear[1]) + 0.5).repeat(linear[0])
    for mlp in layers.mlps:
        found |= {f"{mlp.down}.scale": torch.rand(inner) + 0.5}
        found |= {f"{mlp.down}.order": torch.randperm(inner)}
    return found


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "phi3", "glm", "olmo2", "gemma3", "ministral3", "cohere", "qwen3.5"]
)
@torch.no_grad()
def test_a_converted_adapter_adds_what_the_transformed_model_gained(name):
    base = Model(name)
    for tensor in base.model.parameters():
        # A checkpoint stores in float32 what norms multiply by.
        tensor.copy_((tensor + base.names.norm_offset).float().double() - base.names.norm_offset)
    other, pairs = copy.deepcopy(base), {}
    names, dimensions = base.names, base.dimensions
    for index, block in enumerate(blocks(other.model, names)):
        for layer in names.of_block(index).linears:
            weight = block.get_submodule(layer).weight
            a = torch.randn(RANK, weight.shape[1], dtype=torch.float64)
            b = torch.randn(weight.shape[0], RANK, dtype=torch.float64)
            weight += b @ a
            pairs[index, layer] = a, b
    folded, can_rotate = {}, names.fixed_stream is None
    if can_rotate:
        folded = changes.folded_norms(base.model, names)
        for one in (base, other):
            rotate.rotate_stream(one.model, names, dimensions)
    found = {}
    for index in range(dimensions.layers):
        config, heads = base.model.config, (dimensions.kv_heads, dimensions.head_dim)
        linear = names.linear and (config.linear_num_value_heads, config.linear_value_head_dim)
        own = found_of(names.of_block(index), heads, linear=linear)
        found |= {f"{index}.{key}": tensor for key, tensor in own.items()}
        for one in (base, other):
            mlps = names.of_block(index).mlps
            smooth.apply(blocks(one.model, names)[index], own, names, dimensions, mlps)
    values = None
    if names.fixed_values is None:
        values = rotate.hadamard(dimensions.head_dim)
        for one in (base, other):
            rotate.rotate_values(one.model, names, dimensions)
    stored = changes.stored(names, folded, found, values)
    signs = rotate.hadamard(dimensions.hidden).sign().to(torch.int8) if can_rotate else None
    config = base.model.config.to_dict() | {"architectures": [type(base.model).__name__]}
    basis = Basis(config, Transforms(stored, signs))
    assert pairs
    for (index, layer), (a, b) in pairs.items():
        before, after = (
            blocks(one.model, names)[index].get_submodule(layer).weight for one in (base, other)
        )
        gained = basis.outputs(index, layer, b) @ basis.inputs(index, layer, a)
        torch.testing.assert_close(gained, after - before, rtol=1e-9, atol=1e-9)
        is_changed = can_rotate or names.k_norm is None or layer not in (names.q, names.k)
        assert ((gained - b @ a).abs().max() > 0.1) == is_changed


NAMES = layer_names({"model_type": "llama", **SIZES, "num_key_value_heads": 2})
HIDDEN, HEADS, INNER = 256, (2, 64), 768


@pytest.fixture(scope="module")
def smoothed_dir(nested_dir, tmp_path_factory):
    """A checkpoint that says that its weights were smoothed."""
    out = tmp_path_factory.mktemp("smoothed") / "checkpoint"
    shutil.copytree(nested_dir, out)
    found = [found_of(NAMES.of_block(0), HEADS, INNER) for _ in range(2)]
    smoothed = {f"{i}.{key}": t for i, own in enumerate(found) for key, t in own.items()}
    write_transforms(out, changes.stored(NAMES, {}, smoothed, rotate.hadamard(HEADS[1])))
    return out


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    return write_adapter(tiny_model, tmp_path_factory.mktemp("adapter") / "adapter", seed=0)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["vllm-qoq", "convert-lora", *map(str, arguments)])
    return cli.main()


def test_the_command_writes_an_adapter_that_says_what_it_is_for(
    smoothed_dir, adapter, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "converted"
    assert run(monkeypatch, adapter, smoothed_dir, "-o", out) == 0
    out_text = capsys.readouterr().out
    assert "14 layers" in out_text and "--enable-lora --max-lora-rank 8 and" in out_text
    before, after = (
        json.loads((path / "adapter_config.json").read_text()) for path in (adapter, out)
    )
    mark = after.pop("vllm_qoq")
    assert after == before and mark["converted_for"] == "checkpoint" and len(mark["basis"]) == 16
    changed = products(out)
    for layer, delta in products(adapter).items():
        assert (changed[layer] - delta).abs().max() > 1e-2, layer
    assert run(monkeypatch, adapter, smoothed_dir, "-o", out) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(monkeypatch, adapter, smoothed_dir, "-o", out, "--overwrite", "--json") == 0
    assert json.loads(capsys.readouterr().out)["basis"] == mark["basis"]
    (out / "notes.txt").write_text("mine")
    assert run(monkeypatch, adapter, smoothed_dir, "-o", out, "--overwrite") == 2
    assert "holds notes.txt" in capsys.readouterr().err and (out / "notes.txt").exists()
    assert run(monkeypatch, out, smoothed_dir, "-o", tmp_path / "twice") == 2
    assert "was converted already" in capsys.readouterr().err


def test_the_language_part_of_a_model_of_images_has_other_names(smoothed_dir, adapter, tmp_path):
    whole = shutil.copytree(smoothed_dir, tmp_path / "whole")
    config = json.loads((whole / "config.json").read_text())
    section = config.pop("quantization_config")
    config = {"text_config": config, "quantization_config": section}
    config |= {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    (whole / "config.json").write_text(json.dumps(config))
    renamed = shutil.copytree(adapter, tmp_path / "renamed")
    file = "adapter_model.safetensors"
    inner = {
        name.replace("model.layers", "model.language_model.layers"): tensor
        for name, tensor in load_file(adapter / file).items()
    }
    save_file(inner, renamed / file)
    vllm_qoq.convert_lora(adapter, smoothed_dir, tmp_path / "text")
    vllm_qoq.convert_lora(renamed, whole, tmp_path / "both")
    expected, found = (load_file(tmp_path / name / file) for name in ("text", "both"))
    assert found.keys() == inner.keys()
    for name, tensor in expected.items():
        assert torch.equal(
            found[name.replace("model.layers", "model.language_model.layers")], tensor
        )
    tower = "base_model.model.model.vision_tower.layers.0.self_attn.q_proj.lora_{}.weight"
    inner |= {tower.format("A"): torch.zeros(8, 4), tower.format("B"): torch.zeros(4, 8)}
    save_file(inner, renamed / file)
    with pytest.raises(UserError, match=r"vision_tower.*is none of the layers"):
        vllm_qoq.convert_lora(renamed, whole, tmp_path / "towers")


@pytest.mark.parametrize(
    ("changes_of_config", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: whole modules"),
        ({"use_dora": True}, "use_dora: DoRA"),
        ({"r": "eight"}, "r: 'eight' is not a positive number"),
        ({"lora_alpha": float("nan")}, "lora_alpha: nan is not a positive number"),
        ({"lora_alpha": None}, "lora_alpha: None is not a positive number"),
        ({"r": 64}, "r is 64, but the matrices of .* are of rank 8"),
        (
            {"r": 64, "rank_pattern": {"q_proj": 4}},
            r"r is 64 and of rank_pattern \[4\], but the matrices of .* are of rank 8",
        ),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern: q_proj: 'x' is not a positive"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern: is not a JSON object"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4' changes"),
        ({"bias": "all"}, "bias: 'all'"),
        ({"lora_bias": True}, "lora_bias: biases"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"peft_type": "LOHA"}, "peft_type: 'LOHA'"),
    ],
)
def test_what_is_no_adapter_of_linear_layers_is_refused_by_its_key(
    smoothed_dir, adapter, tmp_path, changes_of_config, message
):
    changed = shutil.copytree(adapter, tmp_path / "adapter")
    write_config(changed, **changes_of_config)
    with pytest.raises(UserError, match=f"adapter_config.json: {message}"):
        vllm_qoq.convert_lora(changed, smoothed_dir, tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["adapter"]


A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"base_model.model.lm_head.lora_A.weight": (8, HIDDEN)}, "lm_head.*other matrix"),
        (
            {
                "base_model.model.lm_head.lora_A.weight": (8, HIDDEN),
                "base_model.model.lm_head.lora_B.weight": (1024, 8),
            },
            "'lm_head': is none of the layers that can be converted",
        ),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": (8, 4)}, "lora_embedding_A"),
        ({A.replace(".lora_A.weight", ".lora_magnitude_vector"): (8,)}, "lora_magnitude_vector"),
        (
            {
                A.replace("layers.0", "layers.2"): (8, HIDDEN),
                B.replace("layers.0", "layers.2"): (HIDDEN, 8),
            },
            "layers.2.self_attn.q_proj': is none",
        ),
        ({A: (8, 64)}, r"is for a weight of \[\d+, 64\]"),
        ({A: (4, HIDDEN)}, "different ranks"),
        ({A.removeprefix("base_model.model."): (8, HIDDEN)}, "are of one layer"),
        ({A: (8,)}, "expected a matrix"),
    ],
)
def test_tensors_that_cannot_be_converted_are_named(
    smoothed_dir, adapter, tmp_path, tensors, message
):
    changed = shutil.copytree(adapter, tmp_path / "adapter")
    found = load_file(adapter / "adapter_model.safetensors")
    found |= {name: torch.zeros(shape) for name, shape in tensors.items()}
    save_file(found, changed / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        vllm_qoq.convert_lora(changed, smoothed_dir, tmp_path / "out")


def test_pickles_are_refused_by_name(smoothed_dir, adapter, tmp_path):
    changed = shutil.copytree(adapter, tmp_path / "adapter")
    (changed / "adapter_model.safetensors").rename(changed / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin: pickle"):
        vllm_qoq.convert_lora(changed, smoothed_dir, tmp_path / "out")


def test_numbers_that_leave_their_dtype_are_refused(smoothed_dir, adapter, tmp_path):
    changed = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    halves = {name: torch.full_like(t, 65000).half() for name, t in tensors.items()}
    save_file(halves, changed / "adapter_model.safetensors")
    message = r"safetensors: .*lora_A\.weight: holds numbers up to 64992, which the conversion "
    message += r"makes as large as \d+\.\d, beyond the 65504 of F16; save the adapter in float32"
    with pytest.raises(UserError, match=message):
        vllm_qoq.convert_lora(changed, smoothed_dir, tmp_path / "out")
    tensors[A][0, 0] = torch.inf
    save_file(tensors, changed / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"{re.escape(A)}: holds NaN or infinity; train"):
        vllm_qoq.convert_lora(changed, smoothed_dir, tmp_path / "out")


def test_the_files_of_an_adapter_are_in_its_folder_as_those_of_a_checkpoint(
    smoothed_dir, adapter, tmp_path
):
    """But for the links of the Hub's cache."""
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        folder = tmp_path / f"with-{file}"
        shutil.copytree(adapter, folder)
        (folder / file).unlink()
        (folder / file).symlink_to(adapter / file)
        with pytest.raises(UserError, match=rf"{file}: is a symbolic link to .*, outside of"):
            vllm_qoq.convert_lora(folder, smoothed_dir, tmp_path / "out")
    cache = tmp_path / "models--org--name"
    shutil.copytree(adapter, cache / "blobs")
    (cache / "snapshots" / "0").mkdir(parents=True)
    for file in adapter.iterdir():
        (cache / "snapshots" / "0" / file.name).symlink_to(f"../../blobs/{file.name}")
    assert vllm_qoq.convert_lora(cache / "snapshots" / "0", smoothed_dir, tmp_path / "out").layers
    with pytest.raises(UserError, match=r"`hf download org/name --local-dir DIR`"):
        vllm_qoq.convert_lora("org/name", smoothed_dir, tmp_path / "out2")


def test_a_checkpoint_without_transforms_says_whether_any_are_needed(
    nested_dir, merged_dir, tiny_model, adapter, tmp_path
):
    def message(checkpoint):
        with pytest.raises(UserError) as refusal:
            vllm_qoq.convert_lora(adapter, checkpoint, tmp_path / "out")
        return str(refusal.value)

    assert "no conversion is needed" in message(nested_dir)
    assert "no quantized weights of ours" in message(tiny_model)
    assert "smoothed by another tool (input_ratio)" in message(merged_dir)
    old = shutil.copytree(nested_dir, tmp_path / "old")
    options = {"rotate": False, "smooth_outputs": False, "reorder": False, "kv_bits": 4}
    report = old / transforms.REPORT
    report.write_text(json.dumps({"options": options | {"smooth_attention": False}}))
    assert "no conversion is needed" in message(old)
    report.write_text(json.dumps({"options": options | {"smooth_attention": True}}))
    assert "smooth_attention), and it holds no qoq_transforms.safetensors" in message(old)
    config = json.loads((old / "config.json").read_text())
    config["quantization_config"]["stream"] = {"rotation": "unknown"}
    (old / "config.json").write_text(json.dumps(config))
    assert "stream is rotated, and it holds no" in message(old)


L0 = "transforms.model.layers.0"


def findings_of(folder):
    checkpoint = Checkpoint.open(folder)
    return [*transforms.structure(checkpoint), *transforms.contents(checkpoint)]


def test_verify_takes_a_checkpoint_with_transforms_and_looks_at_them(smoothed_dir, tmp_path):
    assert vllm_qoq.verify(smoothed_dir).findings == ()
    copied = shutil.copytree(smoothed_dir, tmp_path / "copy")
    (copied / transforms.FILE).write_bytes(b"no")
    assert vllm_qoq.verify(copied).findings == tuple(findings_of(copied)) != ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{L0}.key_scale": None}, f"{L0}.key_scale: missing, other layers have one"),
        ({f"{L0}.key_scale": torch.ones(2, 32)}, r"is F32 \[2, 32\], expected F32 \[2, 64\]"),
        ({f"{L0}.value_scale": torch.zeros(HEADS)}, "value_scale: holds a scale that is not"),
        ({f"{L0}.value_scale": torch.full(HEADS, torch.nan)}, "value_scale: holds NaN"),
        ({f"{L0}.mlp.down_proj.order": torch.zeros(INNER).int()}, "is no order of channels"),
        (
            {"transforms.value_rotation": torch.ones(64, 64).to(torch.int8)},
            "rows that are not orthogonal",
        ),
        (
            {"transforms.model.layers.7.key_scale": torch.ones(HEADS)},
            "is no transform of this model",
        ),
        ({f"{L0}.input_layernorm.folded": torch.ones(HIDDEN)}, "input_layernorm.folded"),
        ({"transforms.weights": None}, "weights: missing, so nothing says that the file is of"),
    ],
)
def test_verify_checks_the_transforms(smoothed_dir, tmp_path, change, message):
    copied = shutil.copytree(smoothed_dir, tmp_path / "copy")
    tensors = load_file(copied / transforms.FILE) | change
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, copied / transforms.FILE, {"transforms_version": "1"})
    findings = findings_of(copied)
    assert any(re.search(f"^{transforms.FILE}: .*{message}", one) for one in findings), findings


def test_transforms_of_another_run_are_refused(smoothed_dir, nested_dir, adapter, tmp_path):
    copied = shutil.copytree(smoothed_dir, tmp_path / "copy")
    for file in nested_dir.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("up_proj.channel_scale")]:
            tensors[name][5] *= 1.01
        save_file(tensors, copied / file.name, {"format": "pt"})
    (finding,) = vllm_qoq.verify(copied).findings
    assert finding.startswith(f"{transforms.FILE}: is of other weights than those beside it")
    with pytest.raises(UserError, match=r"copy: .*is of other weights than those beside it"):
        vllm_qoq.convert_lora(adapter, copied, tmp_path / "out")
    (copied / transforms.FILE).unlink()
    assert vllm_qoq.verify(copied).findings == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no", "damaged or cut off"), (save({"value_rotation": torch.ones(1)}), "is None, and this")],
)
def test_verify_refuses_a_file_of_another_format(smoothed_dir, tmp_path, content, message):
    copied = shutil.copytree(smoothed_dir, tmp_path / "copy")
    (copied / transforms.FILE).write_bytes(content)
    findings = findings_of(copied)
    assert len(findings) == 1 and message in findings[0]
