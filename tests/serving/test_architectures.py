"""A tiny model of every class that can be quantized: quantized, verified, and served by vLLM."""

import engines  # has vLLM run in this process
import pytest
import torch
import transformers
from no_videos import NoVideos
from tiny_models import MODELS, write

from vllm_qoq.bench.evaluate.engine import Engine
from vllm_qoq.bench.evaluate.float_model import FloatModel, load_tokenizer
from vllm_qoq.bench.evaluate.scores import score_window
from vllm_qoq.checkpoint.float_view import FloatView
from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.checkpoint.verify import open_merged, verify
from vllm_qoq.models.table import with_experts, with_names
from vllm_qoq.quantizer.evaluate import int8_inputs, linears
from vllm_qoq.quantizer.job import quantize
from vllm_qoq.quantizer.load import load_model
from vllm_qoq.quantizer.model import layer_names
from vllm_qoq.quantizer.options import QuantizeOptions

NoVideos.use()  # vLLM's Qwen3.5 has a vision tower beside it

LENGTH, FIRST, CHUNK = 64, 8, 16
SETS = ("w8a8", "w4a8")

_kept = []  # vLLM cannot build an engine after another was collected in the same process


@pytest.fixture(scope="module")
def text(heldout_text, tmp_path_factory):
    short = tmp_path_factory.mktemp("text") / "text.txt"
    short.write_text(heldout_text.read_text()[:2000])
    return short


@pytest.mark.parametrize("name", MODELS)
def test_each_set_of_a_quantized_model_answers_nearly_as_the_float_model(
    name, tiny_model, text, tmp_path, monkeypatch
):
    # vLLM's Transformers backend changes these classes, and later tests build them plainly.
    for changed in (transformers.Olmo2Model, transformers.GlmModel):
        for method in ("__init__", "__call__"):
            monkeypatch.setattr(changed, method, getattr(changed, method))
    model, out = write(name, tmp_path / "model", tiny_model), tmp_path / "out"
    options = QuantizeOptions.parse(
        {"samples": 8, "seqlen": 64, "nested": True, "passes": 1}, "options"
    )
    report = quantize(model, out, text, options, max_clipped=0.5).report
    assert verify(out).findings == ()
    names = with_names()[name.partition(",")[0]]
    _check_what_was_left_out(names, report, model, out)
    window = load_tokenizer(model)(text.read_text()).input_ids[:LENGTH]
    expected = FloatModel(model).logits(window, FIRST)
    monkeypatch.setattr("vllm_qoq.bench.evaluate.engine._KV_BYTES", 16 << 20)
    engines.have_expert_group()
    # The 8-bit cache leaves out the mean of K that was measured.
    engine = Engine(out, SETS, length=LENGTH, kv_bits=8, chunk=CHUNK)
    _kept.append(engine)
    logits = {set_name: engine.logits(window, FIRST, set_name) for set_name in SETS}
    eight, four = (
        score_window(expected, logits[set_name], window[FIRST + 1 :]).divergence
        for set_name in SETS
    )
    most_tokens = [_divergences(expected, logits[set_name]).median() for set_name in SETS]
    has_experts = name.partition(",")[0] in with_experts()
    assert most_tokens[0] < 0.2 * most_tokens[1]
    # Of a mixture a few tokens, which go to other experts, make up most of the mean.
    assert four < 0.3 and (has_experts or eight < 0.3 * four)
    if has_experts:
        for weights in open_merged(out)[2]:
            _check_against_dequantized(weights, window, logits[weights.name])


def _check_against_dequantized(weights, window, logits):
    """Most tokens get what the dequantized weights give; the experts of some are a near tie."""
    view = FloatView(weights)
    model, names = load_model(view).float(), layer_names(view.config)
    with torch.no_grad(), int8_inputs(linears(model, names)):
        expected = model(torch.tensor([window]), logits_to_keep=LENGTH - FIRST).logits[0, :-1]
    assert _divergences(expected, logits).median() < 0.003


def _divergences(expected, found):
    """The divergence of each token, in nats: float32 [tokens]."""
    expected, found = expected.float().log_softmax(-1), found.float().log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1)


def _check_what_was_left_out(names, report, model, out):
    """A stream that is not rotated keeps every norm but those of Q and K, bit by bit."""
    is_fixed = names.fixed_stream is not None
    left_out = report.get("left_out", {})
    assert ("rotation of the residual stream" in left_out) == is_fixed
    assert ("mean of K" in left_out) == names.has_capped_scores != report["options"]["k_mean"]
    assert report["options"]["rotate"] == ("values" if is_fixed else True)
    before, after = Checkpoint.open(model), Checkpoint.open(out)
    assert ("stream.rotation" in after.tensors) != is_fixed
    own = {"self_attn.q_norm", "self_attn.k_norm"}
    norms = [n for n in before.tensors if n.endswith("norm.weight")]
    for norm in norms:
        if is_fixed and not any(one in norm for one in own):
            assert torch.equal(after.get(norm), before.get(norm)), norm
    assert len(norms) > 2
