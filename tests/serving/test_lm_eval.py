"""The commands for lm-eval in docs/quantizing.md; they run where it is installed beside vLLM.

CI does without it. It brings scikit-learn, which transformers imports wherever it finds it: that
takes every process that imports vLLM 4 seconds longer.
"""

import json
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from engines import engine

from vllm_qoq.serving.options import Options

TASKS = ROOT / "examples" / "lm_eval"
TEXT = (ROOT / "docs" / "quantizing.md").read_text()
BLOCK = next(
    block for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) if "lm_eval" in block
)
COMMANDS = [shlex.split(piece) for piece in re.split(r"^(?=lm_eval )", BLOCK, flags=re.M)[1:]]
# The first step of a prompt has so many tokens, and reads nothing from the KV cache.
CHUNK = 16

# A mark, since fixtures of the session would be made before one for a test could skip it.
needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm_eval is not installed; CONTRIBUTING.md says how"
)


def model_args(command):
    return json.loads(command[command.index("--model_args") + 1])


def options(command):
    return model_args(command).get("additional_config", {}).get("qoq", {})


def test_commands_give_options_that_there_are():
    assert [options(command) for command in COMMANDS] == [
        *({}, {"force_set": "w4a8"}, {"kv_bits": 4}),
    ]
    for command in COMMANDS:
        Options.model_validate(options(command))
        assert model_args(command)["pretrained"] == "OUT"
    assert model_args(COMMANDS[2])["max_num_batched_tokens"] == CHUNK


@pytest.mark.parametrize("task", ["python_choice", "python_finish"])
def test_tasks_have_their_items(task):
    config = yaml.safe_load((TASKS / f"{task}.yaml").read_text())
    assert config["task"] == task and all(task in command[-3] for command in COMMANDS)
    items = [
        json.loads(line)
        for line in (ROOT / config["dataset_kwargs"]["data_files"]).read_text().splitlines()
    ]
    assert len(items) == 8
    for item in items:
        assert item["choices"][item["answer"]] if "choices" in item else item["answer"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a command in this process: its scores, and what the model answered, by task."""
    import datasets
    import lm_eval.models.vllm_causallms as backend
    from lm_eval.__main__ import cli_evaluate

    def small(model, additional_config=None, **options):
        """vLLM's LLM, kept alive, with what makes tests fast where the command says nothing."""
        given = {key: value for key, value in options.items() if value is not None}
        return engine(Path(model), (additional_config or {}).get("qoq"), **given)

    monkeypatch.setattr(backend, "LLM", small)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(ROOT)

    def run_command(command, checkpoint, **changed):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        arguments = [*command, "--log_samples", "--output_path", str(out)]
        own = model_args(command) | {"pretrained": str(checkpoint)} | changed
        arguments[arguments.index("--model_args") + 1] = json.dumps(own)
        monkeypatch.setattr(sys, "argv", arguments)
        cli_evaluate()
        (file,) = out.rglob("results_*.json")
        results, samples = json.loads(file.read_text())["results"], {}
        for task in results:
            (file,) = out.rglob(f"samples_{task}_*.jsonl")
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            samples[task] = [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
        return results, samples

    return run_command


@needs_lm_eval
def test_choices_are_scored_in_the_set_for_prompts(run, two_sets_dir):
    plain, forced, _ = COMMANDS
    results, routed = run(plain, two_sets_dir)
    assert 0 < results["python_choice"]["acc,none"] <= 1
    assert 0 < results["python_finish"]["exact_match,none"] <= 1
    _, w4a8 = run(forced, two_sets_dir)
    again = {"additional_config": {"qoq": {"force_set": "w8a8"}}}
    _, w8a8 = run(forced, two_sets_dir, **again)
    assert routed["python_choice"] == w8a8["python_choice"] != w4a8["python_choice"]


@needs_lm_eval
def test_the_cache_is_read_where_prompts_run_in_steps(run, two_sets_dir):
    command = COMMANDS[2]
    _, steps = run(command, two_sets_dir)
    _, whole = run(command, two_sets_dir, max_num_batched_tokens=512)
    pairs = list(zip(steps["python_choice"], whole["python_choice"], strict=True))
    # Prompts of one step are the same to the bit.
    assert any(a == b for a, b in pairs) and any(a != b for a, b in pairs)
