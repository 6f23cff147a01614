"""The record of the GPU tests, and what it says of changes since."""

import subprocess

import pytest
from gpu_record import RECORD, Run, not_run_since, read


@pytest.fixture
def history(tmp_path):
    """A repository, and a function that commits a change of a file and returns the hash."""

    def git(*arguments):
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(name):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.read_text() + "x" if file.exists() else "x")
        git("add", name)
        git("commit", "-m", f"change {name}")
        return git("rev-parse", "--short", "HEAD")

    git("init", "-q")
    return commit


def write_record(folder, *runs):
    record = folder / "record.tsv"
    lines = (
        "\t".join((commit, cards, "2.11.0", "0.26.0", "7", "1", "60")) for commit, cards in runs
    )
    record.write_text("\n".join(("header", *lines)) + "\n")
    return record


def test_the_record_is_readable():
    for run in read(RECORD.read_text()):
        assert run.card_count >= 1 and run.passed > 100 and run.seconds > 0


def test_a_line_without_all_columns_is_refused():
    with pytest.raises(ValueError, match="7 columns"):
        Run.parse("abc\t1 x H200")


def test_changes_of_kernels_and_serving_since_the_last_run_are_named(tmp_path, history):
    old = history("csrc/a.cu")
    history("vllm_qoq/serving/b.py")
    tested = history("vllm_qoq/ops/linear_ops.py")
    history("README.md")
    history("vllm_qoq/quantizer/c.py")
    record = write_record(tmp_path, (old, "2 x H100"), (tested, "1 x H200"))
    assert not_run_since(tmp_path, record)[:2] == [
        f"one GPU: 7 passed on 1 x H200 at {tested}",
        f"two GPUs: 7 passed on 2 x H100 at {old}",
    ]
    history("csrc/a.cu")
    _, change, _, *more = not_run_since(tmp_path, record)
    assert change.startswith("  not run since: ") and change.endswith("change csrc/a.cu")
    assert [line.rpartition(" ")[2] for line in more] == [
        "csrc/a.cu",
        "vllm_qoq/ops/linear_ops.py",
        "vllm_qoq/serving/b.py",
    ]


def test_an_unknown_commit_and_no_run_are_said(tmp_path, history):
    history("csrc/a.cu")
    record = write_record(tmp_path, ("abcdef123", "1 x H200"))
    _, unknown, two = not_run_since(tmp_path, record)
    assert "abcdef123 is not in this history" in unknown
    assert two == "two GPUs: never run in full"
