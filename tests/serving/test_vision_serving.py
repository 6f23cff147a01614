"""Models of images and text in vLLM: a real image, a tiny model of the real class, each set."""

import base64
import io
import json
from types import SimpleNamespace

import pytest
import torch
import vision_models
from engines import engine
from no_videos import NoVideos
from rtn_checkpoints import edit, w8a8
from server import Server
from vllm import SamplingParams
from vllm.config import set_current_vllm_config
from warm_process import WITHOUT_TORCHVISION

from merge_tools.job import merge
from vllm_qoq.checkpoint.format import SECTION
from vllm_qoq.checkpoint.verify import open_merged, verify
from vllm_qoq.models.vision import TOWERS
from vllm_qoq.quantizer.job import quantize
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.routing.table import DecodeRow, LayerRule, Routing
from vllm_qoq.serving.methods.steering import Steering, reaching

NoVideos.use()

SETS = ("w8a8", "w4a8")
ONE_IMAGE = {
    "dtype": "float16",
    **{"limit_mm_per_prompt": {"image": 1, "video": 0}, "mm_processor_cache_gb": 0},
    **{"max_num_batched_tokens": 512, "enable_prefix_caching": False},
}


def serve(folder, **qoq):
    # vLLM computes linear attention on a CPU in bfloat16 alone.
    is_hybrid = "linear_attention" in (folder / "config.json").read_text()
    own = {"dtype": "bfloat16"} if is_hybrid else {}
    llm = engine(folder, qoq or None, **ONE_IMAGE | own)
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


@pytest.fixture(scope="module")
def quantized(tiny_model, heldout_text, tmp_path_factory):
    """Makes the model of a name, and the checkpoint with its two sets; each once."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("quantized")
            model = vision_models.write(name, folder / "model", tiny_model)
            (folder / "text.txt").write_text(heldout_text.read_text()[:2000])
            options = {"samples": 8, "seqlen": 64, "nested": True, "passes": 1}
            options = QuantizeOptions.parse(options, "options")
            quantize(model, folder / "out", folder / "text.txt", options, max_clipped=0.5)
            made[name] = SimpleNamespace(model=model, out=folder / "out")
        return made[name]

    return make


@pytest.mark.parametrize("name", vision_models.MODELS)
def test_each_set_of_a_quantized_model_answers_nearly_as_the_float_model(name, quantized):
    model, out = quantized(name).model, quantized(name).out
    assert verify(out).findings == ()
    for file in vision_models.side_files(model):
        assert (out / file.name).read_bytes() == file.read_bytes()
    prompt = f"def {vision_models.MODELS[name]['image']} main(x):\n    return x"
    original = vision_models.FloatModel(name, model)
    expected = original.logits(prompt)
    # The 8-bit cache leaves out the mean of K that was measured.
    served = serve(out, routing=reaching(SETS), kv_bits=8)
    steering, found = Steering(served.model), {}
    for x in SETS:
        steering.follow(Routing(prefill=x, decode=(DecodeRow(set_name=x),)))
        found[x] = logits(served, prompt)
    eight, four = (divergence(expected, found[x]).mean() for x in SETS)
    most = 0.6 if "Moe" in name else 0.4  # some tokens go to other experts
    assert eight < most * four and four < 0.3
    for weights in open_merged(out)[2]:
        dequantized = original.logits_of(weights, prompt)
        assert divergence(dequantized, found[weights.name]).median() < 0.003


def divergence(expected, found):
    """The Kullback-Leibler divergence of each token's distribution."""
    expected, found = expected.log_softmax(-1), found.log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1)


def test_a_server_answers_about_an_image(quantized, tmp_path, monkeypatch):
    """Prompts in w8a8 and generation in w4a8, as the checkpoint says, with its 4-bit cache."""
    monkeypatch.setenv(WITHOUT_TORCHVISION, "1")
    name = "Llava"
    model, out = quantized(name).model, quantized(name).out
    assert json.loads((out / "config.json").read_text())[SECTION]["kv_cache"]["bits"] == 4
    text, pictures = "def main():", [vision_models.picture(seed) for seed in (0, 1)]
    original = vision_models.FloatModel(name, model)
    expected = [
        original.logits(f"<image>{text}", picture)[-1].log_softmax(-1) for picture in pictures
    ]
    options = ("--limit-mm-per-prompt", '{"image": 1}', "--dtype", "float16")
    with Server(out, tmp_path / "log", *options, is_warm=True) as server:
        answers = [chat(server, picture, text) for picture in pictures]
        steps = server.steps()
    gaps = [[gap(answer, one) for one in expected] for answer in answers]
    assert max(gaps[0][0], gaps[1][1]) < 0.5 < min(gaps[0][1], gaps[1][0])
    assert steps["prefill", "w8a8"] >= 2 and steps["decode", "w4a8"] >= 14


def chat(server, picture, text):
    """The likeliest first tokens, with their log-probabilities, of an answer of 8 tokens."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body = {
        "messages": [{"role": "user", "content": content}],
        **{"max_tokens": 8, "temperature": 0, "ignore_eos": True},
        **{"logprobs": True, "top_logprobs": 5, "return_tokens_as_token_ids": True},
    }
    answer = json.loads(server.post("/v1/chat/completions", body))["choices"][0]
    tokens = answer["logprobs"]["content"]
    assert len(tokens) == 8
    top = tokens[0]["top_logprobs"]
    return {int(one["token"].removeprefix("token_id:")): one["logprob"] for one in top}


def gap(answer, expected):
    """The largest difference from log-probabilities [vocabulary]."""
    return max(abs(logprob - float(expected[token])) for token, logprob in answer.items())
