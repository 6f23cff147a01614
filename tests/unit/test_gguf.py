"""A model in GGUF as the input of `quantize`."""

import json
import os
import random
import struct

import pytest
import torch
from gguf_files import TEMPLATE, llama3_frequencies, write_gguf
from safetensors.torch import load_file
from transformers import AutoTokenizer

from vllm_qoq.quantizer import QuantizeError
from vllm_qoq.quantizer.gguf_source.convert import (
    _check,
    _part_of,
    convert,
    gguf_file,
    note,
    source_of,
)
from vllm_qoq.quantizer.gguf_source.header import read_header
from vllm_qoq.quantizer.gguf_source.rope import scaling
from vllm_qoq.quantizer.gguf_source.tokenizer import check_tokenizer
from vllm_qoq.quantizer.inputs import check_inputs, with_local_model
from vllm_qoq.quantizer.plan import Job

TEXT = "In 1984, 12345 words;  def f(x):\n    return x ** 2 # it's <s> done\n\n\tüber"


@pytest.fixture(scope="module")
def file(tiny_model, tmp_path_factory):
    return write_gguf(tiny_model, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def converted(file):
    folder = file.parent / "converted"
    convert(file, folder, quiet=True)
    return folder


def test_weights_config_and_generation_config_are_those_of_the_model(tiny_model, converted):
    stored = load_file(tiny_model / "model.safetensors")
    found = load_file(converted / "model.safetensors")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name].bfloat16()) for name in stored)
    ours, theirs = (
        json.loads((folder / "config.json").read_text()) for folder in (converted, tiny_model)
    )
    for key in (*("architectures", "head_dim", "rope_parameters", "vocab_size"), "eos_token_id"):
        assert ours[key] == theirs[key], key
    assert ours["tie_word_embeddings"] is False and ours["dtype"] == "bfloat16"
    generation = json.loads((converted / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (0, 1)
    assert len({path.stat().st_mode for path in converted.iterdir() if path.suffix}) == 1


def test_the_tokenizer_makes_the_same_tokens_and_has_the_template(tiny_model, converted):
    ours, theirs = map(AutoTokenizer.from_pretrained, (converted, tiny_model))
    for special in (True, False):
        assert ours(TEXT, add_special_tokens=special) == theirs(TEXT, add_special_tokens=special)
    for text in (TEXT, "    indented"):
        assert ours.decode(ours(text).input_ids) == text
    assert (ours.bos_token, ours.eos_token) == ("<s>", "</s>")
    assert ours.chat_template == TEMPLATE


def test_quantize_reads_the_converted_folder_beside_the_output(tiny_model, tmp_path, heldout_text):
    file = write_gguf(tiny_model, tmp_path / "model.gguf", tied=True, quantized=True)
    job = Job(file, tmp_path / "OUT", heldout_text, tmp_path / "work", quiet=True)
    job = with_local_model(job, file)
    assert job.model == tmp_path / "OUT.float"
    assert "lm_head.weight" not in check_inputs(job).checkpoint.tensors
    source = source_of(job.model)
    assert source["types"] == {"Q8_0": 14, "F32": 6} and source["license"] == "apache-2.0"
    assert "14 Q8_0, 6 F32" in note(source)
    before = (job.model / "model.safetensors").stat()
    with_local_model(job, file)  # once
    assert (job.model / "model.safetensors").stat() == before
    os.utime(file, (1, 1))
    with_local_model(job, file)  # the same content
    assert (job.model / "model.safetensors").stat() == before
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(QuantizeError, match=r"OUT\.float: is there already and was not made of"):
        with_local_model(job, file)


def test_a_folder_is_searched_for_one_file(file, tmp_path, tiny_model):
    assert gguf_file(file.parent) == file
    assert gguf_file(tiny_model) is None
    for name in ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(QuantizeError, match=r"has 2 GGUF files, a-00001.*llama-gguf-split"):
        gguf_file(tmp_path)


def test_the_scaling_of_llama_3_1_is_restored_and_no_other(tiny_model, tmp_path):
    frequencies = llama3_frequencies(64, 10000.0, factor=8.0)
    tensors = {"rope_freqs.weight": frequencies}
    file = write_gguf(tiny_model, tmp_path / "a.gguf", tensors=tensors)
    convert(file, tmp_path / "a", quiet=True)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    frequencies[10] *= 1.01
    other = write_gguf(tiny_model, tmp_path / "b.gguf", tensors=tensors)
    with pytest.raises(QuantizeError, match=r"rope_freqs\.weight: is not the scaling of Llama 3"):
        convert(other, tmp_path / "b", quiet=True)
    assert not (tmp_path / "b").exists()


HALF = {"embedding_length": 128, "rope.dimension_count": 32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": {"llama.rope.scaling.type": "yarn"}}, r"llama\.rope\.scaling\.type: 'yarn'"),
        ({"keys": {"llama.expert_count": 8.0}}, r"llama\.expert_count: 8\.0 would be lost"),
        ({"keys": {"llama.rope.scale_linear": 4.0}}, r"llama\.rope\.scale_linear: 4\.0"),
        ({"keys": {"llama.rope.scaling.factor": 4.0}}, r"llama\.rope\.scaling\.factor: 4\.0"),
        ({"without": "llama.attention.layer_norm_rms_epsilon"}, r"rms_epsilon: missing"),
        ({"without": "llama.context_length"}, r"llama\.context_length: missing"),
        ({"sizes": {"attention.head_count": 0}}, r"attention\.head_count: 0 is no positive number"),
        ({"sizes": {"attention.head_count_kv": 0}}, r"attention\.head_count_kv: 0 is no positive"),
        ({"sizes": {"attention.head_count_kv": 3}}, r"head_count_kv: 3 do not divide 4 heads"),
        ({"sizes": {"context_length": 1 << 30}}, r"llama\.context_length: 1073741824, more than"),
        ({"sizes": {"rope.freq_base": 0.0}}, r"llama\.rope\.freq_base: 0\.0 is no positive number"),
        (
            {"sizes": HALF},
            r"embedding_length: with .*token_embd.*\[1024, 256",
        ),
        ({"without": "tokenizer.ggml.tokens"}, r"ggml\.tokens: missing; .*tokenizer\.json"),
        ({"without": "tokenizer.ggml.merges"}, r"ggml\.merges: missing"),
        ({"without": "tokenizer.ggml.scores", "kind": "llama"}, r"ggml\.scores: missing"),
        ({"token": {"bos_token_id": 5000}}, r"ggml\.bos_token_id: 5000 is none of 1024 tokens"),
        ({"token": {"merges": 7}}, r"ggml\.merges: is no array of texts"),
        (
            {"without": "tokenizer.ggml.bos_token_id", "token": {"add_bos_token": True}},
            r"ggml\.bos_token_id: missing, but texts begin with it",
        ),
        ({"sizes": {"block_count": 99}}, r"llama\.block_count: 99, but there are tensors of 2"),
        ({"sizes": {"feed_forward_length": 11}}, r"feed_forward_length: with .*ffn_gate"),
        ({"kind": "rwkv"}, r"tokenizer\.ggml\.model: 'rwkv' is not known.*tokenizer\.json"),
        ({"pre": "new"}, r"tokenizer\.ggml\.pre: 'new' is not known.*tokenizer\.json"),
        (
            {"tensors": {"blk.0.attn_q.bias": torch.zeros(256)}},
            r"has 22 tensors, of which the model that transformers makes has 21.*attn_q\.bias",
        ),
    ],
)
def test_what_would_be_lost_is_refused_by_name(tiny_model, tmp_path, change, message):
    file = write_gguf(tiny_model, tmp_path / "model.gguf", **change)
    with pytest.raises(QuantizeError, match=message):
        convert(file, tmp_path / "out", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_tokenizer_beside_the_file_is_taken(tiny_model, tmp_path):
    file = write_gguf(tiny_model, tmp_path / "model.gguf", pre="new")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    convert(file, tmp_path / "out", quiet=True)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        tiny_model / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda data: b"", "it is empty"),
        *((lambda data, n=n: data[:n], f"cut off: it has {n} bytes") for n in (4, 8, 12, 20)),
        (lambda data: b"PK" + data[2:], "does not begin with GGUF"),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "version 1, not one of"),
        (lambda data: data[:8] + struct.pack("<Q", 1 << 60) + data[16:], "tensors: 1152921504606"),
        (lambda data: data[:16] + struct.pack("<Q", 1 << 60) + data[24:], "keys: 1152921504606"),
        (lambda data: data[:24] + struct.pack("<Q", 1 << 60) + data[32:], "a text of 1152921504"),
        (lambda data: data[:1000], "cut off|buffer"),
        (lambda data: data[:-100000], "leaves the file"),
        # An array of 2^60 numbers, for which other readers would work for ever.
        (
            lambda data: data[:24]
            + struct.pack("<Q1sIIQ", 1, b"k", 9, 4, 1 << 60)[:25],
            "'k': 1152921504606",
        ),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_before_anything_is_read(file, tmp_path, content, message):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content(file.read_bytes()))
    with pytest.raises(QuantizeError, match=message):
        read_header(damaged)


def test_whatever_the_damage_it_is_refused_in_one_line_or_does_not_matter(file, tmp_path):
    """Bytes that are flipped, numbers that are huge, and ends that are missing, in the header."""
    sound, chance = file.read_bytes(), random.Random(0)
    end = min(tensor.start for tensor in read_header(file).tensors.values())
    damaged, refused = tmp_path / "damaged.gguf", 0
    for _ in range(150):
        # The counts and the keys of the model come before the vocabulary, its tensors after it.
        place = chance.choice((chance.randrange(1000), chance.randrange(end)))
        wrong = chance.choice(
            (
                bytes([sound[place] ^ 1 << chance.randrange(8)]),
                struct.pack("<Q", chance.choice((0, 1 << 31, (1 << 63) - 1, (1 << 64) - 1))),
                None,
            )
        )
        kept = sound[:place] + (wrong or b"")
        damaged.write_bytes(kept if wrong is None else kept + sound[len(kept) : end])
        if wrong is not None:
            os.truncate(damaged, len(sound))  # nobody reads the weights
        try:
            header = read_header(damaged)
            _check(header)
            check_tokenizer(header)
            scaling(header)
        except QuantizeError as error:
            refused += 1
            text = str(error)
            assert text.startswith(f"{damaged}: ") and text.isprintable() and len(text) < 600
            assert ";" in text or "known are" in text or "supported are" in text, text
    assert 60 < refused < 150


def test_a_folder_of_somebody_else_is_left_alone(file, tmp_path):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "thesis.txt").write_text("precious")
    with pytest.raises(QuantizeError, match=r"out\.part: is there already and is not ours"):
        convert(file, tmp_path / "out", quiet=True)
    assert (tmp_path / "out.part" / "thesis.txt").read_text() == "precious"


def test_what_a_killed_run_left_is_replaced_and_not_what_another_works_in(file, tmp_path):
    part = tmp_path / "out.part"
    with (
        _part_of(tmp_path / "out"),
        pytest.raises(QuantizeError, match="another run converts the model there"),
    ):
        convert(file, tmp_path / "out", quiet=True)
    assert not part.exists()
    part.mkdir()
    for name in (".gguf_conversion.lock", "model.safetensors"):
        (part / name).write_bytes(b"of a killed run")
    convert(file, tmp_path / "out", quiet=True)
    assert not part.exists() and source_of(tmp_path / "out")["file"] == "tiny.gguf"
    (tmp_path / "out" / ".gguf_source.json").write_text("{")
    with pytest.raises(QuantizeError, match=r"gguf_source\.json: damaged; remove .*out"):
        convert(file, tmp_path / "out", quiet=True)


def test_half_a_tokenizer_beside_the_file_is_refused(tiny_model, tmp_path):
    file = write_gguf(tiny_model, tmp_path / "model.gguf")
    (tmp_path / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    with pytest.raises(QuantizeError, match=r"model\.gguf without tokenizer_config\.json"):
        convert(file, tmp_path / "out", quiet=True)


def test_a_path_without_a_file_is_no_id_of_the_hub(tmp_path, heldout_text):
    job = Job(tmp_path, tmp_path / "OUT", heldout_text, tmp_path / "work", quiet=True)
    with pytest.raises(QuantizeError, match=r"nothere\.gguf: no such file"):
        with_local_model(job, "models/nothere.gguf")


def test_without_the_package_the_message_says_how_to_get_it(file, tmp_path, monkeypatch):
    monkeypatch.setattr("vllm_qoq.quantizer.gguf_source.convert.find_spec", lambda name: None)
    with pytest.raises(QuantizeError, match=r"pip install 'vllm-qoq\[gguf\]'"):
        convert(file, tmp_path / "out", quiet=True)
