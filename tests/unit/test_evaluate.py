"""`vllm-qoq evaluate`: windows, scores, refusals, the picture; the engine is in tests/serving."""

import json
import math
import os
import re
import select
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from vllm_qoq.bench import BenchError
from vllm_qoq.bench.evaluate import plot, report
from vllm_qoq.bench.evaluate.job import FLOAT, Evaluation, Row, check
from vllm_qoq.bench.evaluate.log import pool_settings
from vllm_qoq.bench.evaluate.scores import Estimate, Score, combine, same_tokens, score_window
from vllm_qoq.bench.evaluate.windows import begins_with, cut
from vllm_qoq.errors import UserError
from vllm_qoq.plots import title_of

IDS = list(range(10, 43))  # 33 tokens


def test_windows_begin_with_bos_in_the_place_of_a_token_and_drop_the_rest():
    windows = cut(IDS, bos=1, length=8, most=None)
    assert [window[0] for window in windows.tokens] == [1] * 4
    assert windows.tokens[1] == (1, *IDS[9:16])
    plain = cut(IDS, bos=None, length=8, most=None)
    assert plain.tokens[1] == tuple(IDS[8:16])


def test_the_second_half_is_scored_as_llama_cpp_does():
    """512 tokens: 255 scored, from token 257 on."""
    windows = cut(range(1024), bos=None, length=512, most=None)
    assert (windows.first, windows.scored) == (256, 255)
    assert windows.targets(0) == tuple(range(257, 512))


def test_fewer_windows_come_from_all_over_the_text():
    windows = cut(range(80), bos=None, length=8, most=2)
    assert [window[0] for window in windows.tokens] == [0, 40]


def test_a_text_of_one_window_has_no_error_and_is_refused():
    with pytest.raises(BenchError, match="33 tokens, fewer than two windows of 32"):
        cut(IDS, bos=None, length=32, most=None)


@pytest.mark.parametrize(("adds", "expected"), [(True, 7), (False, None)])
def test_bos_is_what_the_tokenizer_adds_and_not_what_it_has(adds, expected):
    def tokenizer(text, add_special_tokens=True):
        ids = [7, 65] if adds and add_special_tokens else [65]
        return SimpleNamespace(input_ids=ids)

    tokenizer.bos_token_id = 7
    assert begins_with(tokenizer) == expected


def test_divergence_agreement_and_losses_of_a_window_are_those_of_the_formulas():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    q = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])
    found = score_window(p.log() + 3, q.log() - 1, [0, 1])  # logits need not be normal
    expected = (0.5 * math.log(2) + 0.25 * math.log(0.5)) / 2
    assert found.divergence == pytest.approx(expected, rel=1e-5)
    assert found.agreement == 0.5
    assert found.loss == pytest.approx(-(math.log(0.25) + math.log(0.8)) / 2, rel=1e-5)
    assert found.float_loss == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 2, rel=1e-5)


def test_a_token_that_cannot_be_has_no_part_in_the_divergence():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert score_window(logits, logits, [0]).divergence == 0


def test_errors_are_those_of_paired_windows():
    """The windows differ much in how hard they are, and little in what quantization costs."""
    p = [torch.tensor([[0.0, hard]]) for hard in (0.0, 4.0, 8.0)]
    windows = [score_window(one, one * 1.01, [0]) for one in p]
    found = combine(windows)
    assert found.log_ratio.error < 0.03
    losses = torch.tensor([window.loss for window in windows])
    assert found.log_ratio.error < 0.1 * float(losses.std()) / math.sqrt(3)
    assert math.log(found.perplexity / found.float_perplexity) == pytest.approx(
        found.log_ratio.value
    )


def test_greedy_tokens_count_up_to_the_first_that_differs():
    assert [same_tokens([5, 6, 7], found) for found in ([5, 6, 7], [5, 0, 7], [1, 6, 7])] == [
        3,
        1,
        0,
    ]
    windows = [replace(score_window(*[torch.eye(2)] * 2, [0, 1]), greedy_tokens=n) for n in (0, 4)]
    assert combine(windows).greedy_tokens == Estimate(2, 2)


def evaluation():
    def score(divergence, agreement):
        return Score(
            Estimate(divergence, divergence / 10),
            Estimate(agreement, 0.01),
            perplexity=21.0,
            float_perplexity=20.0,
            log_ratio=Estimate(math.log(1.05), 0.002),
            greedy_tokens=Estimate(32 * agreement, 0.5),
        )

    rows = (
        Row(FLOAT, 16, 269_000_000, score(0.001, 0.99)),
        Row("w8a8", 16, 200_000_000, score(0.01, 0.96)),
        Row("w4a8", 16, 150_000_000, score(0.2, 0.8)),
        Row("w8a8", "k8v4", 200_000_000, score(0.04, 0.92)),
        Row("w8a8", 4, 200_000_000, score(0.05, 0.9)),
        Row("w4a8", 4, 150_000_000, score(0.3, 0.75)),
    )
    return Evaluation("OUT", "MODEL", "text.txt", 512, 4, 1020, 16, 32, rows)


def test_the_table_has_a_row_for_every_set_and_cache_and_the_document_all_numbers():
    text = report.text(evaluation())
    assert "| w4a8        |   4 bits | 150.0 MB | 0.30000 ± 0.03000 | 75.00 ± 1.00 % |" in text
    assert "| w8a8        |     k8v4 | 200.0 MB | 0.04000 ± 0.00400 | 92.00 ± 1.00 % |" in text
    assert "1020 tokens of text.txt" in text and "Each made 32 tokens of the first half" in text
    assert re.search(r" 24\.0 ± 0\.5 +\|$", text.splitlines()[-1])
    document = json.loads(json.dumps(evaluation().document()))
    assert document["rows"][5]["score"]["divergence"] == {"value": 0.3, "error": 0.03}


def test_the_picture_says_the_best_and_the_worst_set_and_leaves_the_float_model_out():
    drawn = plot.figure(evaluation())
    assert title_of(drawn).replace("\N{NO-BREAK SPACE}", " ") == (
        "w8a8 with a 16-bit KV cache agrees on 96.0 % of next tokens, w4a8 with a 4-bit KV cache "
        "on 75.0 % of next tokens"
    )
    drawn.canvas.draw()
    lines = [line for line in drawn.axes[0].get_lines() if len(line.get_xdata()) > 1]
    assert list(lines[0].get_xdata()) == [150, 200, 269]


@pytest.mark.parametrize("is_quiet", [True, False])
def test_quiet_shows_what_the_engine_prints_only_where_it_fails(is_quiet, capfd):
    def run(function, argument):
        with pool_settings(is_quiet) as settings, ProcessPoolExecutor(1, **settings) as pool:
            assert pool.submit(os.system, "echo a log; echo a bar >&2").result() == 0
            return pool.submit(function, argument).result()

    assert run(int, "7") == 7
    shown = ("", "") if is_quiet else ("a log\n", "a bar\n")
    assert tuple(capfd.readouterr()) == shown
    with pytest.raises(ValueError, match="invalid literal"):
        run(int, "seven")
    out, err = capfd.readouterr()
    assert "a log" in (err if is_quiet else out) and "a bar" in err


def test_a_killed_run_leaves_no_engine_behind():
    code = (
        "import os, time\nfrom concurrent.futures import ProcessPoolExecutor\n"
        "from vllm_qoq.bench.evaluate.log import pool_settings\n"
        "with pool_settings(True) as settings, ProcessPoolExecutor(1, **settings) as pool:\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    assert select.select([child], [], [], 20)[0]
    os.close(child)


def test_models_that_do_not_belong_together_are_refused_before_one_is_loaded(
    tiny_model, w4a8_dir, heldout_text, tmp_path
):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(UserError, match=f"{tmp_path / 'broken'}: config.json: is not JSON"):
        check(w4a8_dir, tmp_path / "broken", heldout_text, 256, (16, 8, 4))
    with pytest.raises(BenchError, match="quantization_config; give the model in bf16"):
        check(w4a8_dir, w4a8_dir, heldout_text, 256, (16, 8, 4))
    with pytest.raises(BenchError, match=r"--generate 129: at most 128, which is half of"):
        check(w4a8_dir, tiny_model, heldout_text, 256, (16, 8, 4), 129)
    with pytest.raises(BenchError, match=r"bytes, fewer than two windows of 65536 tokens"):
        check(w4a8_dir, tiny_model, heldout_text, 65536, (16, 8, 4))
    most = json.loads((tiny_model / "config.json").read_text())["max_position_embeddings"]
    with pytest.raises(BenchError, match=f"tiny-llama has a context of {most} tokens"):
        check(w4a8_dir, tiny_model, heldout_text, most, (16, 8, 4))
    check(w4a8_dir, tiny_model, heldout_text, most - 1, (16, 8, 4))
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((tiny_model / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 99}))
    (other / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    with pytest.raises(BenchError, match="vocab_size is 99, but 1024 in"):
        check(w4a8_dir, other, heldout_text, 256, (16, 8, 4))
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    with pytest.raises(BenchError, match="num_hidden_layers is 9, but 2 in"):
        check(w4a8_dir, other, heldout_text, 256, (16, 8, 4))
    with pytest.raises(BenchError, match=r"model\.gguf: is GGUF; give the folder .* OUT\.float"):
        check(w4a8_dir, tmp_path / "model.gguf", heldout_text, 256, (16, 8, 4))


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantized_caches_of_another_tools_checkpoint_are_refused_before_work(
    key, tiny_model, heldout_text, tmp_path
):
    """vLLM would take the 16-bit cache, and refuse the next one after minutes."""
    config = json.loads((tiny_model / "config.json").read_text())
    config[key] = {"quant_method": "compressed-tensors"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(tiny_model / "model.safetensors")
    for kv_bits, asked in (((16, 8, 4), r"\(8 bits, 4 bits\)"), (("k8v4",), r"\(k8v4\)")):
        remedy = rf"{asked}; give --kv-bits 16, or .*merge NAME={re.escape(str(tmp_path))} -o"
        with pytest.raises(BenchError, match=f"'compressed-tensors' is .*{remedy}"):
            check(tmp_path, tiny_model, heldout_text, 256, kv_bits)
    check(tmp_path, tiny_model, heldout_text, 256, (16,))
