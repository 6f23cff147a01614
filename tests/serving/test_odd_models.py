"""A model in float32 whose embedding is its lm_head and whose inputs are 1.5 and 2.5 groups:
quantized, checked, served and evaluated."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_qoq.bench.evaluate.job import FLOAT, evaluate
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.checkpoint.verify import verify
from vllm_qoq.quantizer.job import prepare, quantize
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.plan import Job

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=192,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=1024,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(tiny_model / name, folder / name)
    (folder / "LICENSE").write_text("mine")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def text(heldout_text, tmp_path_factory):
    short = tmp_path_factory.mktemp("text") / "text.txt"
    short.write_text(heldout_text.read_text()[:4000])
    return short


def options(**changes):
    few = {"samples": 4, "seqlen": 64, "kv_bits": 16}
    return QuantizeOptions.parse(few | changes, "options")


@pytest.fixture(scope="module")
def quantized(model, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("odd-out") / "checkpoint"
    quantize(model, out, text, options(lm_head_bits=8))
    return out


def test_the_checkpoint_is_whole_and_every_file_comes_along(quantized, model):
    assert verify(quantized).findings == ()
    tensors = Checkpoint.open(quantized).tensors
    assert tensors["w4a8.model.layers.0.mlp.down_proj.group_scale"].shape == (192, 3)
    assert (tensors[HEAD].dtype, tensors[EMBEDDING].dtype) == ("I8", "F32")
    for name in (
        *("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"),
        *("chat_template.jinja", "preprocessor_config.json"),
    ):
        assert (quantized / name).read_bytes() == (model / name).read_bytes(), name


def test_the_loss_in_vllm_is_ordered_as_the_bits_are(quantized, model, text):
    found = evaluate(quantized, model, text, seqlen=64, windows=6, kv_bits=(16,))
    rows = {row.set_name: row for row in found.rows}
    assert list(rows) == [FLOAT, "w8a8", "w4a8"]
    assert found.scored_tokens == 6 * 31
    loss = {name: row.score.divergence.value for name, row in rows.items()}
    assert loss[FLOAT] < loss["w8a8"] < loss["w4a8"]
    assert loss["w8a8"] < 0.5 * loss["w4a8"]
    greedy = {name: row.score.greedy_tokens.value for name, row in rows.items()}
    assert 32 >= greedy[FLOAT] > greedy["w4a8"] > 0 and found.generated == 32
    assert rows["w8a8"].weight_bytes > rows["w4a8"].weight_bytes
    scores = [row.score for row in found.rows]
    assert len({score.float_perplexity for score in scores}) == 1, "one float model for all"
    expected = math.log(rows["w4a8"].score.perplexity / scores[0].float_perplexity)
    assert rows["w4a8"].score.log_ratio.value == pytest.approx(expected)


@pytest.mark.parametrize("has_copy", [False, True])
def test_without_rotation_the_embedding_stays_the_lm_head(model, text, tmp_path, has_copy):
    folder = shutil.copytree(model, tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    if has_copy:
        stored[HEAD] = stored[EMBEDDING].clone()
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    wanted = options(rotate=False, gptq=False, clip=False, reorder=False, smooth_outputs=False)
    quantize(folder, out, text, wanted)
    checkpoint = Checkpoint.open(out)
    assert checkpoint.config["tie_word_embeddings"] is True and HEAD not in checkpoint.tensors
    assert torch.equal(checkpoint.get(EMBEDDING), stored[EMBEDDING])
    assert verify(out).findings == ()


@pytest.mark.parametrize(
    ("changes", "size"),
    [({}, 4 * 192), ({"lm_head_bits": 8}, 192 + 4), ({"rotate": False}, 0)],
)
def test_the_bytes_of_the_lm_head_are_known_before(model, text, tmp_path, changes, size):
    job = Job(model, tmp_path / "out", text, tmp_path / "work")
    assert prepare(job, options(**changes)).sizes.head == 1024 * size


def test_w4a16_in_groups_is_refused_with_what_can_be_done(model, text, tmp_path):
    job = Job(model, tmp_path / "out", text, tmp_path / "work")
    with pytest.raises(ValueError, match=r"q_proj\.weight: \[192, 192\].*--group-size -1, or"):
        prepare(job, options(sets=("w8a8", "w4a16")))
    prepare(job, options(sets=("w8a8", "w4a16"), group_size=-1))
