"""What `quantize` and the other commands know of their inputs before any work: damaged copies.

Each row is a small copy of the test model with one thing wrong, and what must be said of it.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import DATA, ROOT
from safetensors.torch import load_file, save_file

from vllm_qoq import errors
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.cli import main as cli
from vllm_qoq.errors import UserError
from vllm_qoq.quantizer.inputs import check_inputs
from vllm_qoq.quantizer.load import load_model
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.plan import Job, check_job

TEXT = DATA / "calibration.txt"
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"
PY = "raise SystemExit('code of the model was run')\n"


@pytest.fixture
def model(tmp_path):
    """A copy of the test model, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(DATA / "tiny-llama", folder)
    return folder


@pytest.fixture
def job(model, tmp_path):
    return Job(
        model=model, out=tmp_path / "out", text=TEXT, work_dir=tmp_path / "out.work", quiet=True
    )


def config(*without, **changes):
    """Another config.json."""

    def change(folder):
        content = json.loads((folder / "config.json").read_text()) | changes
        content = {key: value for key, value in content.items() if key not in without}
        (folder / "config.json").write_text(json.dumps(content))

    return change


def tensors(change):
    """Another model.safetensors: `change` gets a dict of all tensors."""

    def apply(folder):
        found = load_file(folder / "model.safetensors")
        found = change(found) or found
        save_file({k: v.clone() for k, v in found.items()}, folder / "model.safetensors")

    return apply


def without(*names):
    return tensors(lambda found: {k: v for k, v in found.items() if k not in names})


def with_tensor(name, *shape, dtype=torch.bfloat16):
    return tensors(lambda found: found | {name: torch.ones(*shape, dtype=dtype)})


def with_value(name, value):
    def change(found):
        found[name].view(-1)[-1] = value

    return tensors(change)


def write(name, content):
    def apply(folder):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    return apply


def all_of(*changes):
    def apply(folder):
        for change in changes:
            change(folder)

    return apply


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def link(name, target):
    def apply(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return apply


def cast(dtype, name):
    convert = tensors(lambda found: {k: v.to(dtype) for k, v in found.items()})
    return all_of(convert, config(dtype=name) if name else config("dtype"))


def biased_as_mistral(folder):
    biases = {f"model.layers.{i}.self_attn.{x}_proj.bias": 128 for i in (0, 1) for x in "kv"}
    biases |= {f"model.layers.{i}.self_attn.{x}_proj.bias": 256 for i in (0, 1) for x in "qo"}
    new = {name: torch.zeros(n, dtype=torch.bfloat16) for name, n in biases.items()}
    tensors(lambda found: found | new)(folder)
    config("mlp_bias", architectures=["MistralForCausalLM"], model_type="mistral")(folder)
    config(attention_bias=True)(folder)


SIZES = (
    *("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"),
    "intermediate_size",
)
# Too long for a repr, to begin with.
ODD = {
    "string": "x" * 9999,
    "number as string": "256",
    "float": 256.0,
    "negative": -1,
    "zero": 0,
    "true": True,
    "huge": 10**30,
    "list": [1] * 9999,
    "object": {"a": 1},
}

HEADERS = [
    *(
        pytest.param(config(**{key: value}), f"config.json: {key}: ", id=f"{key} {what}")
        for key in (*SIZES, "head_dim", "num_key_value_heads")
        for what, value in ODD.items()
    ),
    *(pytest.param(config(key), f"config.json: {key}: missing", id=f"no {key}") for key in SIZES),
    *(
        pytest.param(config(**{key: None}), f"config.json: {key}: missing", id=f"{key} null")
        for key in SIZES
    ),
    (config(num_hidden_layers=10**6), "num_hidden_layers: 1000000 is not a whole number from 1 to"),
    (config(num_key_value_heads=3), "num_attention_heads: 4 is not a multiple of .*, 3"),
    (config("head_dim", num_attention_heads=6), "hidden_size: 256 is not a multiple of .*, 6"),
    (config(head_dim=63), "head_dim: 63 is odd"),
    (config(tie_word_embeddings="yes"), "tie_word_embeddings: 'yes' is not true or false"),
    (config(attention_bias=1), "attention_bias: 1 is not true or false"),
    (config(model_type=["llama"]), r"model_type \['llama'\] is not supported; supported are llama"),
    (config("model_type"), "model_type None is not supported"),
    *(
        (config(architectures=names), "architectures: .*cannot be quantized; .*LlamaForCausalLM")
        for names in (
            *(None, [], [5], "LlamaForCausalLM", {"a": 1}, ["LlamaModel"], ["MistralForCausalLM"]),
            *(["LlamaForSequenceClassification"], ["LlamaForTokenClassification"]),
            *(["LlamaForCausalLM", "LlamaModel"], ["LlamaBidirectionalModel"]),
        )
    ),
    (
        config(architectures=["Qwen3ForSequenceClassification"], model_type="qwen3"),
        "Qwen3ForSequenceClassification.* cannot be quantized; .*'Qwen3ForCausalLM'",
    ),
    (config(quantization_config={"quant_method": "fp8"}), "quantized already"),
    (config(dtype="float64"), "dtype: 'float64' is not supported"),
    (config(dtype=["bfloat16"]), "dtype: .* is not supported"),
    (config("dtype", torch_dtype="torch.bfloat16"), "torch_dtype: 'torch.bfloat16' is not"),
    (config("dtype", torch_dtype="int8"), "torch_dtype: 'int8' is not supported"),
    (config(hidden_act="gelu"), "hidden_act: 'gelu' is not supported"),
    (config(attn_logit_softcapping=0), "attn_logit_softcapping: 0 is no positive number"),
    (config(final_logit_softcapping="30"), "final_logit_softcapping: '30' is no positive"),
    (config(rms_norm_eps="1e-5"), "rms_norm_eps: '1e-5' is not"),
    (config(rms_norm_eps=float("nan")), "rms_norm_eps: nan is not"),
    (config(max_position_embeddings=-1), "max_position_embeddings: -1 is not"),
    (config(rope_theta=0), "rope_theta: 0 cannot be"),
    (config(rope_theta="1e4"), "rope_theta: '1e4' cannot be"),
    (config(rope_parameters={"rope_theta": float("inf")}), "rope_parameters.rope_theta: inf"),
    (config(rope_parameters=7), "rope_parameters: 7 is not an object"),
    (config(rope_scaling={"type": "linear", "factor": -2}), "rope_scaling.factor: -2 cannot be"),
    (config(rope_scaling={"type": 5}), "rope_scaling.type: 5 cannot be"),
    (config(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor: 0.5 is not"),
    # tensors
    (without(HEAD), f"{HEAD} is missing; .*tie_word_embeddings"),
    (all_of(without(HEAD), config("tie_word_embeddings")), f"{HEAD} is missing"),
    (without(EMBEDDING), f"{EMBEDDING} is missing"),
    (all_of(without(EMBEDDING), config(tie_word_embeddings=True)), f"{EMBEDDING} is missing"),
    (without(NORM), f"{NORM} is missing; download it again"),
    (without("model.layers.1.input_layernorm.weight"), "layers.1.input_layernorm.weight is miss"),
    (without(UP), "up_proj.weight is missing"),
    (config(num_hidden_layers=3), "model.layers.2.self_attn.q_proj.weight is missing"),
    (config(attention_bias=True), "self_attn.[qkvo]_proj.bias is missing"),
    (config(num_hidden_layers=1), "layers.1.* is beyond num_hidden_layers = 1"),
    (with_tensor("model.layers.2.eh_proj.weight", 256, 512), "is beyond num_hidden_layers = 2"),
    (with_tensor("v_head.summary.weight", 1, 256), "v_head.summary.weight: .*would be lost; "),
    (with_tensor("score.weight", 2, 256), "score.weight: .*would be lost"),
    (with_tensor("model.layers.0.mlp.up_proj.weight_scale", 768, 1), "up_proj.weight_scale: "),
    (with_tensor("model.layers.0.self_attn.q_proj.bias", 256), "q_proj.bias: .*would be lost"),
    (config(vocab_size=1000), r"\[1024, 256\], but config.json makes it \[1000, 256\]"),
    (config(num_key_value_heads=4), r"\[128, 256\], but config.json makes it \[256, 256\]"),
    (with_tensor(NORM, 255), r"norm.weight: is \[255\], but config.json makes it \[256\]"),
    (with_tensor(NORM, 256, 1), r"\[256, 1\], but"),
    (with_tensor(UP, 768, 256, dtype=torch.int8), "up_proj.weight: is I8, but BF16, F16, F32 can"),
    (with_tensor(NORM, 256, dtype=torch.float64), "norm.weight: is F64"),
    # files
    (remove("tokenizer.json"), "has no tokenizer"),
    (remove("config.json"), "config.json: missing"),
    (write("config.json", b"{"), "config.json: is not JSON: .*; mend"),
    (write("config.json", b"\xff{}"), "config.json: is not JSON: .*; mend"),
    (write("config.json", b"\xef\xbb\xbf{}"), "config.json: is not JSON: .*BOM.*; mend"),
    (write("config.json", "{}".encode("utf-16")), "config.json: is not JSON: .*; mend"),
    (write("config.json", b"[" * 99999), "config.json: is nested too deeply; mend"),
    (write("config.json", b'{"a":' * 99 + b"1" + b"}" * 99), "nested more than 64 levels"),
    (write("config.json", b'{"a": ' + b"9" * 5000 + b"}"), "config.json: is not JSON: .*; mend"),
    (write("config.json", [1]), "is not a JSON object"),
    (write("config.json", b'{"a": 1, "a": 1}'), "'a': the key occurs twice; mend"),
    (link("chat_template.jinja", "/etc/hostname"), "chat_template.jinja: is a symbolic link to"),
    (link("tokenizer.json", DATA / "tiny-llama/tokenizer.json"), "tokenizer.json: is a symbolic"),
    (link("config.json", DATA / "tiny-llama/config.json"), "config.json: is a symbolic link"),
    (link("model.safetensors", DATA / "tiny-llama/model.safetensors"), "model.safetensors: is a"),
]


@pytest.mark.parametrize(("damage", "message"), HEADERS)
def test_what_headers_tell_is_refused(model, job, damage, message):
    damage(model)
    with pytest.raises(UserError, match=message) as error:
        check_inputs(job)
    assert "; " in str(error.value) and len(str(error.value)) < 700
    assert not job.out.exists()


TIE = config(tie_word_embeddings=True)
LOADED = [
    # numbers
    (with_value(NORM, float("nan")), f"{NORM}: holds NaN or infinity"),
    (with_value(NORM, float("inf")), f"{NORM}: holds NaN or infinity"),
    (with_value(UP, float("nan")), f"{UP}: holds NaN or infinity"),
    (with_value(EMBEDDING, float("-inf")), f"{EMBEDDING}: holds NaN or infinity"),
    (with_value(HEAD, float("nan")), f"{HEAD}: holds NaN or infinity"),
    (
        all_of(with_value(UP, 1e6), config(dtype="float16")),
        f"{UP}: holds 999424, beyond the float16",
    ),
    (TIE, f"{HEAD}: differs from {EMBEDDING}, although config.json ties them"),
    # tokenizer
    (write("tokenizer.json", b"{"), "tokenizer cannot be loaded"),
    (write("tokenizer.json", {}), "tokenizer cannot be loaded"),
    (write("tokenizer.json", b"\xff"), "tokenizer cannot be loaded"),
    (write("tokenizer_config.json", b"[]"), "tokenizer cannot be loaded"),
    (
        all_of(
            write(
                "tokenizer_config.json",
                {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
            ),
            write("own.py", PY.encode()),
        ),
        r"tokenizer cannot be loaded \(its own code \(auto_map\) is not run",
    ),
    (
        all_of(
            config(vocab_size=512),
            tensors(lambda found: found | {k: found[k][:512] for k in (HEAD, EMBEDDING)}),
        ),
        "tokens up to 1023, but the embedding only 512 rows",
    ),
    (
        all_of(
            config(vocab_size=2048),
            tensors(lambda found: found | {k: found[k].repeat(2, 1) for k in (HEAD, EMBEDDING)}),
        ),
        "has 1024 tokens, but the embedding 2048 rows",
    ),
    # what transformers knows
    (config(attention_dropout="x"), "config.json: .*attention_dropout"),
    (config(rope_parameters={"rope_theta": 1e4, "rope_type": "own"}), "cannot build the model"),
    (biased_as_mistral, r"q_proj.bias|o_proj.bias|k_proj.bias: is \[\d+\] there and missing"),
]


def test_a_token_that_no_row_stands_for_is_refused_in_the_text_only(model, job):
    file = model / "tokenizer.json"
    known = json.loads(file.read_text())
    pad = {**known["added_tokens"][0], "id": 1024, "content": "[PAD]"}
    file.write_text(json.dumps(known | {"added_tokens": [*known["added_tokens"], pad]}))
    assert check_job(job, QuantizeOptions(samples=1, seqlen=16)).samples
    text = model.parent / "text"
    text.write_text("[PAD]" * 20)
    with pytest.raises(UserError, match=r"has '\[PAD\]', which is token 1024, but .*; take"):
        check_job(replace(job, text=text), QuantizeOptions(samples=1, seqlen=16))


@pytest.mark.parametrize(("damage", "message"), LOADED)
def test_what_only_the_libraries_and_the_weights_tell_is_refused(
    model, job, damage, message, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    damage(model)
    with pytest.raises(UserError, match=message) as error:
        check_job(job, QuantizeOptions(samples=1, seqlen=16))
    assert "\n" not in str(error.value) and "; " in str(error.value)
    assert not job.out.exists() and not job.work_dir.exists()


def tied(folder, has_copy):
    def change(found):
        found[EMBEDDING] = found[HEAD]
        if not has_copy:
            del found[HEAD]

    all_of(tensors(change), TIE)(folder)


INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
FINE = [
    lambda folder: tied(folder, has_copy=False),
    lambda folder: tied(folder, has_copy=True),
    cast(torch.float16, "float16"),
    cast(torch.float32, "float32"),
    cast(torch.float32, None),
    config("dtype", torch_dtype="bfloat16"),
    config(quantization_config=None),
    config("head_dim"),
    with_tensor(INV_FREQ, 32, dtype=torch.float32),
    write("pytorch_model.bin", b"a pickle"),
    write("generation_config.json", b"{"),
    write("processor_config.json", {}),
    config(transformers_weights="other.safetensors", attn_implementation="own/kernels"),
]


@pytest.mark.parametrize("change", FINE)
def test_what_is_harmless_is_taken(model, job, change):
    change(model)
    plan = check_job(job, QuantizeOptions(samples=1, seqlen=16))
    assert len(plan.linears) == 14 and len(plan.samples) == 1
    loaded, stored = load_model(Checkpoint.open(model)), load_file(model / "model.safetensors")
    head = stored.get(HEAD, stored[EMBEDDING])
    assert loaded.lm_head.weight.dtype == head.dtype and torch.equal(loaded.lm_head.weight, head)


def test_transformers_gets_the_weights_that_were_checked_and_no_others(model):
    expected = load_file(model / "model.safetensors")
    with_value(NORM, 7.0)(model)
    shutil.move(model / "model.safetensors", model / "shard.safetensors")
    names = dict.fromkeys(expected, "shard.safetensors")
    write("model.safetensors.index.json", {"weight_map": names})(model)
    # transformers itself would take this one, without the gain
    save_file(expected, model / "model.safetensors")
    save_file({"x": torch.zeros(1)}, model / "consolidated.safetensors")
    write("adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "x"})(model)
    loaded = load_model(Checkpoint.open(model))
    assert float(loaded.model.norm.weight[-1].detach()) == 7.0
    assert torch.equal(loaded.lm_head.weight, expected[HEAD])
    assert {info.file for info in Checkpoint.open(model).tensors.values()} == {"shard.safetensors"}


def test_a_checkpoint_has_the_files_of_its_model_but_no_code(model, tmp_path, monkeypatch, capfd):
    all_of(
        config(auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}),
        write("own.py", PY.encode()),
        write("additional_chat_templates/tool_use.jinja", b"tools"),
        *(write(name, {}) for name in ("processor_config.json", "preprocessor_config.json")),
        write("quantization_report.json", {"of": "another run"}),
        write("original/params.json", {}),
        write("original/consolidated.00.pth", b"a pickle"),
    )(model)
    out = tmp_path / "out"
    few = ["--samples", "1", "--seqlen", "16", "--no-clip", "--no-gptq", "--sets", "w8a8", "-q"]
    arguments = ["vllm-qoq", "quantize", model, "-o", out, "--text", TEXT, *few]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert cli.main() == 0, capfd.readouterr().err
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_bytes() == b"tools"
    assert "layers" in json.loads((out / "quantization_report.json").read_text())
    assert not list(out.glob("*.py")) and not (out / "original").exists()
    assert "auto_map" not in json.loads((out / "config.json").read_text())


# command lines


def command(*arguments, **options):
    options = {"capture_output": True, "cwd": ROOT, "timeout": 60} | options
    return subprocess.run([sys.executable, "-m", "vllm_qoq.cli", *arguments], **options)


IMPORTED = """
import sys
from vllm_qoq.cli.main import main
sys.argv = ["vllm-qoq", *sys.argv[1:]]
code = main()
print([m for m in ("torch", "transformers", "llmcompressor", "vllm") if m in sys.modules])
sys.exit(code)
"""
TINY = DATA / "tiny-llama"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["quantize", "typo", "--text", TEXT],
            "typo: neither a folder, nothing is there, nor an id",
        ),
        (["quantize", "org/model", "--text", "typo.txt"], "--text typo.txt: no such file"),
        (["quantize", TINY, "--text", "typo.txt"], "--text typo.txt: no such file"),
        (["quantize", TINY, "--text", DATA], "not a regular file"),
        (["quantize", TINY, "--text", "LATIN1"], "not UTF-8 at byte 1048577 "),
        (["quantize", TINY, "--text", TEXT, "--eval-text", "LATIN1"], "--eval-text .*not UTF-8"),
        (["quantize", TINY, "--text", TEXT, "--recipe", "DEEP"], "--recipe .*nested too deeply"),
        (["quantize", TINY, "--text", TEXT, "--recipe", "LATIN1"], "--recipe .*larger than"),
        (["quantize", TINY, "--text", TEXT, "--recipe", "typo"], "--recipe typo: no such file"),
        (["quantize", TINY, "--text", TEXT, "--sets", "w8a8,w9"], "options.sets.1: .*'w9'"),
        (["quantize", TINY, "--text", TEXT, "-o", "."], "exists already|overlaps|current folder"),
        (["merge", "a=x", "b=y", "--routing", "typo"], "--routing typo: no such file; give"),
        (["merge", "a=x", "b=y", "--prefill="], "routing.prefill names the set '', but"),
        (["inspect", TINY], "quant_method is None, not 'qoq', so .*; give a folder that quantize"),
        (["import", "typo", "--base", TINY], "typo: neither a folder, nothing is there, nor an id"),
        (
            ["import", TINY, "--base", "org/model"],
            "org/model: the Hub is not asked, because HF_HUB_",
        ),
        (["import", TINY, "--base", "MILLION"], "num_hidden_layers: 1000000 is not"),
        (["tune", "typo"], "typo: not a folder"),
        (["perplexity", TINY, "--text", TEXT, "--seqlen", "9999999"], "fewer than one window of"),
        (["perplexity", TINY, "--text", "typo.txt"], "--text typo.txt: no such file"),
        (["perplexity", TINY, "--text", "LATIN1"], "not UTF-8"),
        (["perplexity", "/typo", "--text", TEXT], "/typo: not a folder"),
        (["perplexity", TINY, "--text", TEXT, "--force-set", "w8"], "--force-set w8: .*no sets"),
        (
            ["perplexity", "FOREIGN", "--text", TEXT, "--kv-bits", "16"],
            r"'gptq' is .* \(--kv-bits 16\); leave --kv-bits out, or make",
        ),
    ],
)
def test_what_needs_no_import_is_refused_before_any(tmp_path, arguments, message):
    (tmp_path / "LATIN1").write_bytes(b"x" * ((1 << 20) + 1) + b"\xe4 \n")
    (tmp_path / "DEEP").write_text('{"a":' * 99999)
    shutil.copytree(TINY, tmp_path / "MILLION")
    config(num_hidden_layers=10**6)(tmp_path / "MILLION")
    shutil.copytree(TINY, tmp_path / "FOREIGN")
    config(quantization_config={"quant_method": "gptq"})(tmp_path / "FOREIGN")
    arguments = [tmp_path / a if (tmp_path / str(a)).exists() else a for a in arguments]
    if arguments[0] in ("quantize", "import", "merge") and "-o" not in arguments:
        arguments += ["-o", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and done.stdout == "[]\n", done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line


def test_names_that_are_not_utf8_are_refused():
    done = command(b"quantize", TINY, b"-o", b"out\xff", b"--text", TEXT)
    assert done.returncode == 2 and done.stderr == (
        b"error: out\\udcff: is not UTF-8; rename that file or folder\n"
    )


def test_a_reader_that_stops_and_a_full_disk_get_one_line():
    reader, writer = os.pipe()
    os.close(reader)
    for out, reason in ((writer, b"Broken pipe"), (os.open("/dev/full", os.O_WRONLY), b"No space")):
        for arguments in (["doctor", "--json"], ["--help"]):
            options = {"stdout": out, "stderr": subprocess.PIPE, "capture_output": False}
            done = command(*arguments, **options, env=os.environ | {"PYTHONUNBUFFERED": ""})
            assert done.returncode == 2
            (line,) = done.stderr.splitlines()
            assert line.startswith(b"error: ") and reason in line
        os.close(out)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_without_stdout_or_stderr_nothing_begins(closed):
    line = f"{sys.executable} -m vllm_qoq.cli.main doctor {closed}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, cwd=ROOT)
    assert done.returncode == 2 and b"Traceback" not in done.stderr


def test_values_in_messages_are_short():
    for value in ("x" * 10**6, [[["x"] * 999] * 999], 10**4000, {"a": {"b": {"c": {"d": 1}}}}):
        assert len(errors.shown(value)) <= 100
    assert errors.shown([4, 8]) == "[4, 8]" and errors.shown("a\x1b") == r"'a\x1b'"


@pytest.mark.parametrize("name", ["quantize", "import", "merge"])
def test_every_option_has_a_help_text(name):
    parser = cli._parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for action in commands.choices[name]._actions:
        assert action.help, action.option_strings
