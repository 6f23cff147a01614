"""The array for Slurm, with a command and a scheduler that say what they are asked."""

import os
import signal
import subprocess
import time

from conftest import ROOT

COMMAND = """#!/usr/bin/env bash
[[ $2 == none ]] && exit 2
[[ $2 == early ]] && kill -TERM $$
echo "$@"
trap 'exit 130' TERM
touch "$4.begun"
for _ in {1..400}; do [[ $1 == caption && $2 != endless ]] && exit 1; sleep 0.02; done
"""


def begin(folder, shards):
    for name, text in (("vllm-qoq", COMMAND), ("scontrol", '#!/bin/sh\necho "$@"\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    environment |= {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "77"}
    line = [ROOT / "examples" / "caption.slurm", "8", shards, folder / "out", "ckpt", "-q"]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_job_has_its_shards_and_the_status_of_the_command(tmp_path):
    job = begin(tmp_path, "shards")
    out, _ = job.communicate(timeout=20)
    assert job.returncode == 1
    expected = f"caption shards -o {tmp_path}/out --model ckpt --job-id 3 --num-jobs 8 -q\n"
    assert out == expected


def test_a_job_whose_time_is_over_is_put_into_the_queue_again(tmp_path):
    job = begin(tmp_path, "endless")
    deadline = time.monotonic() + 20
    while not (tmp_path / "out.begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=20)
    assert (job.returncode, out.splitlines()[-1]) == (130, "requeue 77_3")


def test_a_command_that_is_told_to_end_while_it_begins_is_put_there_too(tmp_path):
    out, _ = (job := begin(tmp_path, "early")).communicate(timeout=20)
    assert (job.returncode, out) == (143, "requeue 77_3\n")


def test_the_status_of_a_command_that_ends_at_once_is_not_lost(tmp_path):
    for _ in range(20):
        job = begin(tmp_path, "none")
        job.communicate(timeout=20)
        assert job.returncode == 2
