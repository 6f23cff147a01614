"""The engine of `vllm-qoq bench serving`, really: what it measures, and that it goes on."""

import sys

import pytest
from qoq_checkpoints import write_checkpoint
from warm_process import run as run_warm

from vllm_qoq.bench.serving import run
from vllm_qoq.bench.serving.cases import Lengths
from vllm_qoq.bench.serving.job import Job, check_job
from vllm_qoq.bench.serving.records import read
from vllm_qoq.bench.serving.work import opened
from vllm_qoq.environment import describe

LENGTHS = Lengths(32, 8)
EAGER = {"enforce_eager": True, "kv_cache_memory_bytes": 16 << 20}


@pytest.fixture(scope="module")
def checked(tiny_model, tmp_path_factory):
    work = tmp_path_factory.mktemp("bench")
    checkpoint = work / "checkpoint"
    write_checkpoint(tiny_model, checkpoint)
    job = Job(
        model=None,
        work_dir=work / "work",
        checkpoints=(("mine", checkpoint),),
        lengths=(LENGTHS,),
        batches=("1", "3", "full"),
        most=8,
        engine_args=EAGER,
    )
    found = check_job(job)
    with opened(job.work_dir):
        run._prepare(found, describe())
    return found


def test_an_engine_measures_its_cases_largest_first_and_once(checked):
    work = checked.job.work_dir
    command = [sys.executable, "-m", "vllm_qoq.bench.serving.engine"]
    command += [work / "mine.json", work / "mine.jsonl"]
    first = run_warm(command, timeout=300)
    assert first.returncode == 0, first.stderr[-3000:]
    facts, measured = read(work / "mine.jsonl")
    assert [one.batch for one in measured] == [8, 3, 1]
    assert facts.pool_tokens >= 8 * LENGTHS.tokens and facts.start_seconds > 0
    for one in measured:
        assert 0 < one.prompts_seconds < one.seconds
        assert 0 < one.step_seconds < one.seconds
    # One request takes its prompt, and a step for each token after the first.
    alone = measured[-1]
    steps = alone.prompts_seconds + (LENGTHS.new - 1) * alone.step_seconds
    assert steps == pytest.approx(alone.seconds, rel=0.1)
    (subject,) = checked.subjects
    assert run._is_complete(subject, facts, measured)
    assert not run._is_complete(subject, facts, measured[:2])
