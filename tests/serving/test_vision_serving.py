"""Models of images and text in vLLM: a real image, a tiny model of the real class, each set."""

from types import SimpleNamespace

import pytest
import torch
import vision_models
from engines import engine
from rtn_checkpoints import edit, w8a8
from vllm import SamplingParams
from vllm.config import set_current_vllm_config

from merge_tools.job import merge
from vllm_qoq.checkpoint.verify import open_merged, verify
from vllm_qoq.models.vision import TOWERS
from vllm_qoq.quantizer.job import quantize
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.routing.table import DecodeRow, LayerRule, Routing
from vllm_qoq.serving.methods.steering import Steering, reaching

vision_models.NoVideos.use()

SETS = ("w8a8", "w4a8")
ONE_IMAGE = {
    "dtype": "float16",
    **{"limit_mm_per_prompt": {"image": 1, "video": 0}, "mm_processor_cache_gb": 0},
    **{"max_num_batched_tokens": 512, "enable_prefix_caching": False},
}


def serve(folder, **qoq):
    llm = engine(folder, qoq or None, **ONE_IMAGE)
    (model,) = llm.apply_model(lambda model: model)
    return SimpleNamespace(llm=llm, model=model)


def logits(served, prompt):
    """The logits [tokens, vocabulary] of a prompt with an image."""
    steps = []
    hook = served.model.register_forward_hook(lambda _, __, hidden: steps.append(hidden.clone()))
    request = {"prompt": prompt, "multi_modal_data": {"image": vision_models.picture()}}
    try:
        served.llm.generate([request], SamplingParams(max_tokens=1), use_tqdm=False)
    finally:
        hook.remove()
    with torch.inference_mode(), set_current_vllm_config(served.llm.llm_engine.vllm_config):
        return served.model.compute_logits(torch.cat(steps)).float()


def test_each_set_of_a_merged_model_equals_its_single_set_checkpoint(tiny_model, tmp_path):
    name = "Qwen2_5_VL"
    model = vision_models.write(name, tmp_path / "model", tiny_model)
    prompt = f"def {vision_models.MODELS[name]['image']} main():"

    def round_more(tensors, config):
        for key, tensor in tensors.items():
            if tensor.dtype == torch.int8:
                tensors[key] = (tensor.float() / 16).round().clamp(-7, 7).mul(16).to(torch.int8)

    folders = {x: w8a8(model, tmp_path / x, TOWERS) for x in ("fine", "coarse")}
    edit(folders["coarse"], round_more)
    single = {}
    for x, folder in folders.items():
        single[x] = logits(serve(vision_models.finish(folder, model)), prompt)
    assert not torch.allclose(single["fine"], single["coarse"], atol=0.1)
    merge(folders, tmp_path / "merged")
    served = serve(tmp_path / "merged", routing=reaching(list(folders)))
    steering = Steering(served.model)
    for x, expected in single.items():
        steering.follow(Routing(prefill=x, decode=(DecodeRow(set_name=x),)))
        assert torch.equal(logits(served, prompt), expected)
    # A rule has the names of the checkpoint, which vLLM's two models rename one after the other.
    rule = LayerRule(match="model.layers.*", prefill="coarse")
    row = DecodeRow(set_name="fine")
    steering.follow(Routing(prefill="fine", decode=(row,), layers=(rule,)))
    assert torch.equal(logits(served, prompt), single["coarse"])


@pytest.mark.parametrize("name", vision_models.MODELS)
def test_each_set_of_a_quantized_model_answers_nearly_as_the_float_model(
    name, tiny_model, heldout_text, tmp_path
):
    model = vision_models.write(name, tmp_path / "model", tiny_model)
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(heldout_text.read_text()[:2000])
    options = {"samples": 8, "seqlen": 64, "nested": True, "passes": 1}
    quantize(model, out, text, QuantizeOptions.parse(options, "options"), max_clipped=0.5)
    assert verify(out).findings == ()
    for file in vision_models.side_files(model):
        assert (out / file.name).read_bytes() == file.read_bytes()
    prompt = f"def {vision_models.MODELS[name]['image']} main(x):\n    return x"
    original = vision_models.FloatModel(name, model)
    expected = original.logits(prompt)
    served = serve(out, routing=reaching(SETS), kv_bits=8)
    steering, found = Steering(served.model), {}
    for x in SETS:
        steering.follow(Routing(prefill=x, decode=(DecodeRow(set_name=x),)))
        found[x] = logits(served, prompt)
    for weights in open_merged(out)[2]:
        dequantized = original.logits_of(weights, prompt)
        print(weights.name, divergence(dequantized, found[weights.name]))
    eight, four = (divergence(expected, found[x]).mean() for x in SETS)
    print(eight, four)
    assert eight < 0.3 * four and four < 0.3


def divergence(expected, found):
    """The Kullback-Leibler divergence of each token's distribution."""
    expected, found = expected.log_softmax(-1), found.log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1)
