"""Sets of one model that say so differently: dtypes, configs, heads, biases, leftovers."""

import json

import pytest
import torch
from rtn_checkpoints import awq, edit, gptq, w8a8
from safetensors.torch import load_file, save_file

from merge_tools import kv_basis
from merge_tools.__main__ import main
from merge_tools.meaning import normal
from vllm_qoq.checkpoint.folder import Checkpoint, TensorInfo
from vllm_qoq.checkpoint.stored_set import StoredSet

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def merge(monkeypatch, tmp_path):
    """merge(OPTION...): the exit code of a merge of tmp_path / "a8" and "b4" into "out"."""

    def run(*options) -> int:
        sets = [f"{name}={tmp_path / name}" for name in ("a8", "b4")]
        command = ["merge_tools", "merge", *sets, "-o", str(tmp_path / "out"), "-q", *options]
        monkeypatch.setattr("sys.argv", command)
        return main()

    return run


@pytest.fixture
def pair(tiny_model, tmp_path):
    """W8A8 in bf16 and GPTQ, to be edited."""
    return w8a8(tiny_model, tmp_path / "a8"), gptq(tiny_model, tmp_path / "b4")


def merged(tmp_path):
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors, config


def to_half(tensors, config):
    """As AWQ and GPTQ tools do; very small values are flushed."""
    config["torch_dtype"] = "float16"
    config.pop("dtype", None)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:
            tensors[name] = tensor.half()


@pytest.mark.parametrize(
    ("options", "dtype"),
    [((), "bfloat16"), (("--prefill", "b4"), "bfloat16"), (("--dtype", "float16"), "float16")],
)
def test_float16_beside_bfloat16(merge, tiny_model, tmp_path, capsys, options, dtype):
    def tiny_values(tensors, config):
        tensors[EMBEDDING][0, :4] = torch.tensor([1e-9, 3e-8, 7.3e-6, 1e-5])

    edit(w8a8(tiny_model, tmp_path / "a8"), tiny_values)
    edit(edit(awq(tiny_model, tmp_path / "b4"), tiny_values), to_half)
    assert merge(*options) == 0
    said = capsys.readouterr().out
    assert options[:1] == ("--dtype",) or f"dtype: {dtype}" in said
    tensors, config = merged(tmp_path)
    assert {config.get("dtype"), config.get("torch_dtype")} - {None} == {dtype}
    assert str(tensors[EMBEDDING].dtype) == f"torch.{dtype}"
    source = load_file(tmp_path / ("a8" if dtype == "bfloat16" else "b4") / "model.safetensors")
    assert torch.equal(tensors[EMBEDDING], source[EMBEDDING])


def test_what_rounding_does_not_explain_is_another_model(merge, pair, tmp_path, capsys):
    def change(tensors, config):
        to_half(tensors, config)
        tensors[EMBEDDING][5, 5] *= 1.02

    edit(pair[1], change)
    assert merge() == 2
    message = capsys.readouterr().err
    assert EMBEDDING in message and "probably" not in message


def transformers_4(tensors, config):
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": int(rope["rope_theta"]), "rope_scaling": None}
    config |= {"transformers_version": "4.44.0", "use_cache": False, "_name_or_path": "a/b"}
    config |= {"pad_token_id": 0, "attention_dropout": 0.0, "_attn_implementation": "sdpa"}
    config["eos_token_id"] = [config["eos_token_id"]]
    for key in ("attention_bias", "mlp_bias", "pretraining_tp", "head_dim"):
        config.pop(key, None)


def test_layouts_of_two_transformers_are_one_model(merge, pair):
    edit(pair[1], transformers_4)
    assert merge() == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}},
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
        ),
        ({"rope_theta": 1e4}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}}),
        ({"partial_rotary_factor": 1.0}, {"rope_parameters": {"rope_type": "default"}}),
        ({"text_config": {"torch_dtype": "float16"}}, {"text_config": {"dtype": "bfloat16"}}),
        ({"sliding_window": 4096, "use_sliding_window": False}, {"sliding_window": None}),
        ({"layer_types": ["full_attention"] * 2}, {}),
        (
            {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64},
            {"hidden_size": 256, "num_attention_heads": 4},
        ),
    ],
)
def test_two_spellings_have_one_meaning(old, new):
    assert normal(old) == normal(new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 1e4}}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4}},
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 8}},
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, {"rope_parameters": {"rope_type": "linear"}}),
        ({"sliding_window": 4096}, {"sliding_window": None}),
        ({"attention_bias": True}, {}),
        ({"partial_rotary_factor": 0.5}, {}),
        ({"eos_token_id": [1, 2]}, {"eos_token_id": 1}),
    ],
)
def test_two_meanings_stay_two(old, new):
    assert normal(old) != normal(new)


def test_a_rope_that_differs_is_refused(merge, pair, capsys):
    def change(tensors, config):
        transformers_4(tensors, config)
        config["rope_theta"] = 500000.0

    edit(pair[1], change)
    assert merge() == 2
    assert "rope_parameters" in capsys.readouterr().err


def tie(tensors, config):
    config["tie_word_embeddings"] = True
    tensors[HEAD] = tensors[EMBEDDING]


def tie_without_copy(tensors, config):
    tie(tensors, config)
    del tensors[HEAD]


def copy_untied(tensors, config):
    tie(tensors, config)
    config["tie_word_embeddings"] = False


@pytest.mark.parametrize(
    ("first", "second", "has_head"),
    [
        (tie, tie_without_copy, False),
        (tie_without_copy, tie, False),
        (tie_without_copy, copy_untied, False),
        (copy_untied, tie_without_copy, True),
        (copy_untied, tie, True),
        (tie, tie, False),
    ],
)
def test_a_copy_of_the_tied_head_is_no_other_model(
    merge, pair, tmp_path, capsys, first, second, has_head
):
    for folder, change in zip(pair, (first, second), strict=True):
        edit(folder, change)
    assert merge() == 0
    tensors, config = merged(tmp_path)
    assert (HEAD in tensors) is has_head
    assert config["tie_word_embeddings"] is not has_head
    is_dropped = tie in (first, second) or (first, second) == (tie_without_copy, copy_untied)
    assert ("a copy of the embedding" in capsys.readouterr().out) is is_dropped


def test_heads_that_contradict_each_other_are_refused(merge, pair, capsys):
    edit(pair[1], tie_without_copy)
    assert merge() == 2
    assert HEAD in capsys.readouterr().err
    assert merge("--prefill", "b4") == 2
    assert f"{HEAD}: is the embedding in b4" in capsys.readouterr().err


def test_a_tied_head_that_is_not_the_embedding_is_refused(merge, pair, capsys):
    edit(pair[0], lambda tensors, config: config.update(tie_word_embeddings=True))
    assert merge() == 2
    message = capsys.readouterr().err
    assert HEAD in message and "tie_word_embeddings: true" in message


def test_tensors_that_no_model_reads_are_left_out(merge, pair, tmp_path, capsys):
    def add(tensors, config):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
        for index in range(2):
            tensors[f"model.layers.{index}.input_layernorm.bias"] = torch.zeros(256)

    edit(pair[1], add)
    assert merge() == 0
    said = capsys.readouterr().out
    assert "left out b4.model.layers.0.self_attn.rotary_emb.inv_freq: vLLM computes it" in said
    assert "left out b4.model.layers.0.input_layernorm.bias: a bias of zeros" in said
    assert not [name for name in merged(tmp_path)[0] if "inv_freq" in name or "bias" in name]


def test_minus_zero_is_zero(merge, pair):
    def change(sign):
        def edited(tensors, config):
            tensors[EMBEDDING][3, 3] = sign * 0.0

        return edited

    for folder, sign in zip(pair, (1.0, -1.0), strict=True):
        edit(folder, change(sign))
    assert merge() == 0


def test_a_tokenizer_of_two_versions_is_one(merge, pair, capsys):
    path = pair[1] / "tokenizer.json"
    content = json.loads(path.read_text())
    model = content["model"]
    is_pairs = isinstance(model["merges"][0], list)
    model["merges"] = [" ".join(m) if is_pairs else m.split(" ") for m in model["merges"]]
    model["ignore_merges"] = False
    path.write_text(json.dumps(content))
    (pair[0] / "vocab.json").write_text("{}")
    (pair[0] / "merges.txt").write_text("#version: 0.2")
    assert merge() == 0
    del model["merges"][-1]
    path.write_text(json.dumps(content))
    assert merge("--overwrite") == 2
    assert "tokenizer.json: differs" in capsys.readouterr().err


PIXELS = {"image_mean": [0.5, 0.5, 0.5], "size": {"longest_edge": 512, "shortest_edge": 256}}


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (
            {"preprocessor_config.json": PIXELS},
            {"preprocessor_config.json": PIXELS | {"image_mean": [0.4, 0.5, 0.5]}},
            "preprocessor_config.json: image_mean: is [0.5, 0.5, 0.5] in a8 and [0.4, 0.5, 0.5] in",
        ),
        (
            {"preprocessor_config.json": PIXELS},
            {
                "preprocessor_config.json": PIXELS,
                # This is what is read.
                "processor_config.json": {"image_processor": {"size": {"longest_edge": 64}}},
            },
            "size.longest_edge: is 512 in a8 and 64 in b4 (processor_config.json: image_processor)",
        ),
        (
            {"processor_config.json": {"patch_size": 14}},
            {"processor_config.json": {"patch_size": 16}},
            "processor_config.json: patch_size: is 14 in a8 and 16 in b4",
        ),
        (
            {"video_preprocessor_config.json": {"fps": 2}},
            {"video_preprocessor_config.json": {"fps": 4}},
            "video_preprocessor_config.json: fps: is 2 in a8 and 4 in b4",
        ),
        ({"chat_template.jinja": "{{ a }} x"}, {"chat_template.jinja": "{{ a }} y"}, "character 8"),
        (
            {"chat_template.jinja": "x"},
            {"chat_template.json": {"chat_template": "y"}},
            "chat_template.jinja: differs from character 0 on: is 'x' in a8 and 'y' in b4 (chat_",
        ),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": "tools", "template": "x"}]}},
            {"additional_chat_templates/tools.jinja": "y"},
            "tokenizer_config.json: chat_template: 'tools': differs",
        ),
    ],
)
def test_other_pixels_or_prompts_are_refused(merge, pair, tmp_path, capsys, ours, theirs, message):
    for folder, files in zip(pair, (ours, theirs), strict=True):
        write_files(folder, files)
    assert merge("--dry-run") == 2
    error = capsys.readouterr().err
    assert message in error and "copy the right file into the folders of all other sets" in error
    assert not (tmp_path / "out").exists()


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)


def test_what_tools_rewrite_in_processors_and_templates_is_no_difference(merge, pair, tmp_path):
    old = {"size": 224, "do_resize": None, "image_mean": [0.5] * 3, "processor_class": "A"}
    sides = {"height": 224, "width": 224, "longest_edge": None}
    new = {"size": sides, "do_resize": True, "rescale_factor": 0.1, "image_mean": [0.5] * 3}
    write_files(
        pair[0],
        {"preprocessor_config.json": old, "tokenizer_config.json": {"chat_template": "{{ a }}"}},
    )
    write_files(
        pair[1],
        {
            "processor_config.json": {"image_processor": new, "processor_class": "B"},
            "chat_template.jinja": "{{ a }}\n",
            # Left over from before, and not read beside the file.
            "tokenizer_config.json": {"chat_template": "old"},
        },
    )
    assert merge("--dry-run") == 0


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"window_size": 56}, "vision_config.window_size: is 112 in a8 and 56 in b4; "),
        ({}, "vision_config.window_size: is 112 in a8 and absent in b4; "),
    ],
)
def test_the_key_of_a_nested_config_that_differs_is_named(merge, pair, capsys, theirs, message):
    long = {f"key_{i}": [i] * 9 for i in range(20)}

    def say(own):
        return lambda tensors, config: config.update({"vision_config": {**long, **own}})

    edit(pair[0], say({"window_size": 112}))
    edit(pair[1], say(theirs))
    assert merge("--dry-run") == 2
    assert message in capsys.readouterr().err


def test_a_config_in_a_file_that_vllm_leaves_unread_is_told(merge, pair, capsys):
    def drop(tensors, config):
        section = config.pop("quantization_config")
        (pair[1] / "quantize_config.json").write_text(json.dumps(section))

    edit(pair[1], drop)
    assert merge() == 2
    assert "quantize_config.json" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["compression_config", "text_config"])
def test_a_config_is_read_where_vllm_reads_it(merge, pair, tmp_path, place):
    def move(tensors, config):
        section = config.pop("quantization_config")
        config[place] = section if place[0] == "c" else {"quantization_config": section}

    for folder in pair:
        edit(folder, move)
    # A nested config describes the language model, so it needs the number of layers.
    if place == "text_config":
        for folder in pair:
            edit(folder, lambda _, c: c["text_config"].update(num_hidden_layers=2))
    assert merge() == 0
    config = merged(tmp_path)[1]
    assert config["quantization_config"]["quant_method"] == "qoq"
    assert "compression_config" not in config
    assert "quantization_config" not in config.get("text_config", {})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--decode", "0:b4,a8"], ("'0:b4,a8'", "'0'", "from 1")),
        (["--decode", "16:"], ("'16:'", "name is missing")),
        (["--decode", "16:,a8"], ("name is missing",)),
        (["--decode", ""], ("name is missing",)),
        (["--decode", "4:b4,4:a8,b4"], ("[4, 4]", "grow")),
        (["--decode", "8:b4,4:a8,b4"], ("[8, 4]", "grow")),
        (["--decode", "b4,a8"], ("row 1", "no batch size")),
        (["--decode", "4:b4"], ("above 4", "end the decode table")),
        (["--decode", "9" * 5000 + ":b4,a8"], ("999...", "not a batch size")),
        (["--decode=-1:b4,a8"], ("'-1'",)),
        (["--decode", "1.5:b4,a8"], ("'1.5'",)),
        (["--decode", "٣:b4,a8"], ("not a batch size",)),
        (["--decode", "4:c,a8"], ("'c'", "a8, b4")),
        (["--prefill", "c"], ("'c'", "a8, b4")),
    ],
)
def test_a_wrong_decode_table_is_told_with_its_remedy(merge, tmp_path, capsys, arguments, named):
    assert merge(*arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    assert all(part in message for part in named) and len(message) < 400, message


@pytest.mark.parametrize(
    ("sets", "named"),
    [
        (["FOLDER"], "write NAME=DIR, for example w8a8=FOLDER"),
        (["=FOLDER"], "write NAME=DIR, for example w8a8=FOLDER"),
        (["a8="], "write NAME=DIR, for example w8a8=a8"),
        (["A8=FOLDER"], "'A8=FOLDER': set name 'A8'"),
        (["model=FOLDER"], "reserved"),
        (["a8=FOLDER", "a8=OTHER"], "given twice (FOLDER)"),
        (["a8=FOLDER", "b4=./FOLDER/"], "the folder of set 'a8'"),
        (["a8=org/model"], "org/model"),
    ],
)
def test_a_wrong_source_is_told_with_its_remedy(monkeypatch, tmp_path, capsys, sets, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["merge_tools", "merge", *sets, "-o", "out", "-q"])
    assert main() == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and named in message, message


def test_a_size_of_many_digits_is_refused(merge, capsys):
    with pytest.raises(SystemExit, match="2"):
        merge("--max-shard-size", "9" * 400 + "GB")
    assert "is not a size" in capsys.readouterr().err


def test_the_card_says_where_the_model_comes_from(merge, pair, tmp_path):
    front = "---\nlicense: llama3\nbase_model:\n- meta-llama/Llama-3-8B\nevil: |\n  x\n---\n# x\n"
    (pair[0] / "README.md").write_text(front)
    (pair[1] / "README.md").write_text(
        "---\nbase_model: 'meta-llama/Llama-3-8B'\nlicense: llama3\n"
        'license_link: "a\\u000ab"\n---'
    )
    assert merge() == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith(
        '---\nlicense: "llama3"\nbase_model: ["meta-llama/Llama-3-8B"]\n'
        "base_model_relation: quantized\nlibrary_name: vllm\n"
    )
    assert "evil" not in card and "Made with vllm-qoq " in card and "| total |" in card


def test_licences_that_differ_are_said_and_not_chosen(merge, pair, tmp_path):
    for folder, licence in zip(pair, ("mit", "apache-2.0"), strict=True):
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    assert merge() == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nlicense:" not in card and "differ in license: apache-2.0, mit" in card


def test_biases_of_k_and_v_are_compared_in_fused_layers_too(tmp_path):
    name, sets = "model.layers.0.self_attn.qkv_proj.bias", {}
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    for place, row in (("one", None), ("of_q", 0), ("of_k", 16)):
        bias = torch.ones(32)  # of q 16 rows, of k and v 8 each
        if row is not None:
            bias[row] = 2
        save_file({name: bias}, tmp_path / f"{place}.safetensors")
        info = TensorInfo(name, "F32", (32,), f"{place}.safetensors")
        sets[place] = StoredSet(place, Checkpoint(tmp_path, config, {name: info}), {}, {name: info})
    assert list(kv_basis.biases(sets["one"], sets["of_q"])) == []
    assert list(kv_basis.biases(sets["one"], sets["of_k"])) == [name]
