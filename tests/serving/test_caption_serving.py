"""`vllm-qoq caption` with a real engine: a tiny quantized LLaVA, real JPEGs, kills."""

import io
import json
import os
import shutil
import signal
import sys
import time

import caption_shards as shards
import pytest
import vision_models
import warm_process
from engines import engine
from no_videos import NoVideos
from PIL import Image
from vllm import SamplingParams
from warm_process import WITHOUT_TORCHVISION

from vllm_qoq.caption.engine import Engine
from vllm_qoq.caption.errors import CaptionError
from vllm_qoq.caption.messages import Request
from vllm_qoq.checkpoint.format import SECTION
from vllm_qoq.quantizer.job import quantize
from vllm_qoq.quantizer.options import QuantizeOptions

NoVideos.use()

PROMPT, SYSTEM, TOKENS = "def main():", "import os\n", 16
# One caption at a time: what runs beside it changes the last bits, and a random model's words.
ENGINE = {
    "enforce_eager": True,
    **{"dtype": "float16", "max_model_len": 512, "max_num_seqs": 1, "max_num_batched_tokens": 512},
    **{"kv_cache_memory_bytes": 64 << 20, "gpu_memory_utilization": 0.3},
}


@pytest.fixture(scope="module")
def llava(tiny_model, heldout_text, tmp_path_factory):
    """A LLaVA in w4a8 with a 4-bit KV cache."""
    folder = tmp_path_factory.mktemp("llava")
    model = vision_models.write("Llava", folder / "model", tiny_model)
    (folder / "text.txt").write_text(heldout_text.read_text()[:2000])
    options = {"samples": 2, "seqlen": 64, "sets": ["w4a8"], "effort": "fast"}
    options = QuantizeOptions.parse(options, "options")
    quantize(model, folder / "tiny", folder / "text.txt", options, max_clipped=0.5)
    config = json.loads((folder / "tiny" / "config.json").read_text())
    assert config[SECTION]["kv_cache"]["bits"] == 4
    return folder / "tiny"


def picture(seed):
    file = io.BytesIO()
    vision_models.picture(seed).save(file, "JPEG")
    return file.getvalue()


def command(model, data, out, *more):
    return [
        *(sys.executable, "-m", "vllm_qoq.cli", "caption", data, "-o", out, "--model", model),
        *("--prompt", PROMPT, "--system-prompt", SYSTEM, "--max-tokens", TOKENS),
        *("--engine-args", json.dumps(ENGINE), *more),
    ]


ENVIRONMENT = {WITHOUT_TORCHVISION: "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def test_captions_are_those_of_chats_whatever_ends_the_command_between(llava, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    seeds = {f"{shard}": range(24 * shard, 24 * shard + 24) for shard in range(2)}
    for name, part in seeds.items():
        samples = [{"__key__": f"k{seed}", "jpg": picture(seed)} for seed in part]
        samples.insert(5, {"__key__": "bad", "jpg": picture(0)[:300]})
        shards.write(data / f"{name}.tar", samples)
    line, environment = command(llava, data, out), os.environ | ENVIRONMENT
    begun = warm_process.Command(line, tmp_path / "log", env=environment)
    wait(begun, lambda: lines(out) > 2)
    os.kill(begun.pid, signal.SIGKILL)
    begun.wait(10)
    # Ended as a scheduler does it, and then to the end.
    kept = lines(out)
    second = warm_process.Command(line, tmp_path / "log2", env=environment)
    wait(second, lambda: lines(out) > kept)
    os.kill(second.pid, signal.SIGTERM)
    assert second.wait(90) == 130
    assert "the same command goes on there" in (tmp_path / "log2").read_text()
    lines_kept = lines(out)
    assert kept < lines_kept
    done = warm_process.run([*line, "--json"], 120, environment)
    assert done.returncode == 1, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["samples"], found["captions"], found["failures"]) == (50, 48, {"damaged": 2})
    assert found["run"]["images"] + found["run"]["failures"] == 50 - lines_kept
    assert found["run"]["images_per_second"] > 0
    assert 0 < found["run"]["engines"][0]["full"] <= found["run"]["engines"][0]["busy"] <= 1
    llm = engine(llava, None, **ENGINE, limit_mm_per_prompt={"image": 1, "video": 0})
    for name, part in seeds.items():
        captions = json.loads((out / f"{name}.json").read_text())
        assert list(captions) == [f"k{seed}" for seed in part]
        for seed in part[::4]:
            assert captions[f"k{seed}"] == {"tiny": chat(llm, seed)}
    assert len({json.dumps(caption) for caption in captions.values()}) > 6


def test_models_that_cannot_caption_are_refused_by_name(llava, tiny_model, tmp_path):
    def start(model):
        facts = {"out": tmp_path, "name": "x", "prompt": PROMPT, "system_prompt": None, "log": None}
        facts |= {"retry_failed": False}
        facts |= {"max_tokens": 2, "temperature": 0.0, "engine_args": ENGINE, "decoders": 1}
        return Engine(Request(model=str(model), devices=None, processors=None, **facts))

    with pytest.raises(CaptionError, match="takes no images; give a model that does"):
        start(tiny_model)
    silent = tmp_path / "silent"
    shutil.copytree(llava, silent)
    words = json.loads((silent / "tokenizer_config.json").read_text())
    words.pop("chat_template", None)
    (silent / "tokenizer_config.json").write_text(json.dumps(words))
    (silent / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(CaptionError, match=r"cannot caption a grey image: .*chat template"):
        start(silent)
    with pytest.raises(
        CaptionError, match=r"vLLM did not start: .*max_model_lem.*; change --engine-args"
    ):
        ENGINE["max_model_lem"] = 1
        try:
            start(llava)
        finally:
            del ENGINE["max_model_lem"]


def lines(out):
    """How many samples are on the disk of shards that are not finished, and of those that are."""
    begun = sum(file.read_bytes().count(b"\n") - 1 for file in out.glob("?.partial.jsonl"))
    return begun + 25 * len(list(out.glob("?.json")))


def wait(process, is_there):
    deadline = time.monotonic() + 120
    while not is_there():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def chat(llm, seed):
    """What a chat about the JPEG answers."""
    image = Image.open(io.BytesIO(picture(seed))).convert("RGB")
    content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": PROMPT}]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS)
    return llm.chat(messages, sampling, use_tqdm=False)[0].outputs[0].text
