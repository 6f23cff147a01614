"""examples/measure_captioning.py with a tiny shape: formats of vLLM and ours, transformers."""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import sys
from multiprocessing import forkserver
from types import SimpleNamespace

import engines  # noqa: F401 - what vLLM does slowly is done otherwise, also in forks of this process
import pytest
from example_scripts import load_example
from no_videos import NoVideos
from PIL import Image
from warm_process import fork_where_vllm_spawns

from vllm_qoq.bench.serving import formats
from vllm_qoq.checkpoint.format import SECTION, Section
from vllm_qoq.models.vision import language_config

NoVideos.use()

ENGINE = {
    **{"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 4},
    **{"kv_cache_memory_bytes": 16 << 20, "gpu_memory_utilization": 0.3},
}
OPTIONS = ("--images", 5, "--sizes", 56, "--new-tokens", 3, "--transformers-images", 3)


class Here:
    """A process that runs an example in this one."""

    def __init__(self, line, env, stdout, text):
        script = load_example(line[1].rpartition("/")[2].removesuffix(".py"))
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(printed):
            patched.setattr(sys, "argv", line[1:])
            script.main()
        self.returncode, self.printed = 0, printed.getvalue()

    def communicate(self):
        return self.printed, None


@pytest.fixture(scope="module")
def script():
    """The script; processes of engines are forks of this one, which has imported everything."""
    module = load_example("measure_captioning")
    sys.modules[module.__name__] = module  # its function is called by name in another process
    get_context = multiprocessing.get_context
    fork_where_vllm_spawns()
    yield module
    multiprocessing.get_context = get_context
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
    forkserver._forkserver._stop()
    del sys.modules[module.__name__]


@pytest.fixture
def measure(script, tmp_path, monkeypatch, capfd):
    """Runs the script into `out`; its document, its table, and what it says besides."""
    out = tmp_path / "out"
    monkeypatch.setattr(script, "subprocess", SimpleNamespace(Popen=Here, PIPE=None))

    def run(*more):
        words = ["tiny", "-o", out, *OPTIONS, "--engine-args", json.dumps(ENGINE), *more]
        monkeypatch.setattr(sys, "argv", ["measure_captioning.py", *map(str, words)])
        script.main()
        said = capfd.readouterr()
        return json.loads((out / "captioning.json").read_text()), said.out, said.err

    return run


def test_a_format_of_ours_vllms_and_transformers_caption_the_same_images(
    measure, script, tmp_path, monkeypatch
):
    found, table, _ = measure("--ways", "bf16", "w4a8-kv4", "transformers")
    float_model, ours, peer = found["runs"]
    for run in (float_model, ours):
        said = json.loads((tmp_path / f"out/runs/56-1-{run['way']}.json").read_text())["said"]
        assert (said["captions"], said["tokens"], said["failures"]) == (5, 15, {})
        # Four tokens of the image, two around it, and five words.
        assert (said["prompt_tokens"], run["images"], run["prompt_tokens"]) == (55, 5, 11)
        assert 0 < run["full"] <= run["busy"] <= 1 and run["start_seconds"] > 0
    assert (peer["images"], peer["batches"]) == (3, [5]) and "busy" not in peer
    ratio = ours["images_per_second"] / float_model["images_per_second"]
    assert f"| {ratio:.2f} |" in table.splitlines()[3].replace("  ", " ")
    assert not list((tmp_path / "out" / "captions").iterdir())

    def fail(*_):
        raise AssertionError("measured twice")

    monkeypatch.setattr(script, "with_vllm", fail)
    again, same, _ = measure("--ways", "bf16", "w4a8-kv4")
    assert (again["runs"], same) == (found["runs"], table)
    *_, two = measure("--ways", "transformers", "--gpus", 2)[0]["runs"]
    assert (two["gpus"], two["images"], len(two["batches"])) == (2, 2, 2)


def test_a_run_that_fails_is_named_and_its_log_stays(measure, script, tmp_path, capfd):
    bad = json.dumps({"max_model_lem": 1})
    with pytest.raises(SystemExit, match="missing in the table: 56-1-bf16"):
        measure("--ways", "bf16", "--engine-args", bad)
    said = capfd.readouterr().err
    assert "56-1-bf16: failed: the engine: " in said and "max_model_lem" in said
    assert list((tmp_path / "out" / "captions" / "56-1-bf16").glob("*.log"))
    with pytest.raises(SystemExit, match="holds runs with other options"):
        measure("--ways", "bf16")


@pytest.mark.parametrize(
    "shape, way",
    [
        ("qwen2.5-vl-7b", "w4a8-kv4"),
        *(("tiny", way) for way in ("nested-head8-k8v4", "fp8-kvfp8", "w8a8", "w4a16")),
    ],
)
def test_checkpoints_leave_the_tower_in_float(script, tmp_path, shape, way):
    folder = script.write_checkpoint(tmp_path, shape, formats.parse(way))
    config = json.loads((folder / "config.json").read_text())
    text = language_config(config)
    assert text["hidden_size"] // text["num_attention_heads"] == 128
    section = config[SECTION]
    if section["quant_method"] == "qoq":
        Section.parse(section)
        section = section["sets"]["w4a8"]
    assert any("visual" in name for name in section["ignore"])
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(words.values()) == list(range(config["vocab_size"]))
    assert words["<|image_pad|>"] == config["image_token_id"]


def test_images_have_as_many_bytes_as_photographs(script):
    images = list(script.photographs(3, 168))
    assert len({*images, *script.photographs(2, 168)}) == 3
    for content in images:
        image = Image.open(io.BytesIO(content))
        assert (image.format, image.size, image.mode) == ("JPEG", (168, 168), "RGB")
        assert 1.5 < 8 * len(content) / 168**2 < 4


def test_ratios_are_to_the_fastest_of_vllms_formats_beside(script):
    speeds = {"bf16": 10, "fp8-kvfp8": 20, "w4a8-kv4": 30, "transformers": 5}
    runs = [
        {"size": 336, "gpus": gpus, "way": way, "images_per_second": speed * gpus}
        | {"tokens_per_second": 300 * speed, "batches": [64]}
        for gpus in (1, 2)
        for way, speed in speeds.items()
    ]
    rows = [row.split("|") for row in script.table(runs).splitlines()[2:]]
    assert [row[8].strip() for row in rows] == ["0.50", "1.00", "1.50", "0.25"] * 2
    assert script.table(runs[2:3]).splitlines()[2].split("|")[8].strip() == ""
