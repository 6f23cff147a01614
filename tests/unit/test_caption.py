"""`vllm-qoq caption` with an engine without a model: what is written, resumed, counted, refused."""

import json
import multiprocessing
import os
import re
import signal
import sys
import tarfile
import threading
import time
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import caption_shards as shards
import pytest
from conftest import ROOT
from PIL import Image
from warm_process import fork_where_vllm_spawns

from vllm_qoq.caption import devices, folder, journal, lock, pipeline, run, status
from vllm_qoq.caption.bounded import Bounded, Closed
from vllm_qoq.caption.errors import CaptionError, Uncaptioned
from vllm_qoq.caption.job import Job, check
from vllm_qoq.caption.journal import Journal
from vllm_qoq.caption.records import Caption, Failure, Line
from vllm_qoq.caption.shards import find
from vllm_qoq.cli import main as cli
from vllm_qoq.engine_log import cause

BAD = {"ok.1": None, "text": "no_image", "words": "not_an_image", "cut": "damaged"}
BAD |= {"wide": "refused", "same": "duplicate_key", "b\udcfed": "bad_name", "ok.2": None}
# Without the address of the object, which differs from run to run.
WIDE = "too wide: <PIL.Image.Image image mode=RGB size=100x2>"
# A key ends at the first dot of a name.
GOOD = {"ok": "24 x 16, 1 0 0", "same": "24 x 16, 3 0 0", "last": "24 x 16, 4 0 0"}


@pytest.fixture(autouse=True, scope="module")
def forked():
    """Processes of engines are forks of this one, which has imported everything."""
    get_context, seconds = multiprocessing.get_context, journal._DYING_SECONDS
    journal._DYING_SECONDS = 0.5  # nothing is killed here
    fork_where_vllm_spawns()
    yield
    journal._DYING_SECONDS = seconds
    multiprocessing.get_context = get_context
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
    forkserver._forkserver._stop()


@pytest.fixture
def model(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    return tmp_path / "tiny"


@pytest.fixture
def command(model, tmp_path, monkeypatch, capfd):
    """Runs the command on `data`, into `out`; its status, stdout and stderr."""
    monkeypatch.setattr(run, "caption", partial(run.caption, make=shards.colours))

    def ask(*more, data=tmp_path / "data"):
        line = ["vllm-qoq", "caption", data, "-o", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", [*map(str, [*line, "--model", model, *more])])
        stdout = os.dup(1)  # the command leaves it to what libraries print
        try:
            status = cli.main()
        except SystemExit as refused:  # of the parser
            status = refused.code
        os.dup2(stdout, 1)
        os.close(stdout)
        said = capfd.readouterr()
        return status, said.out, said.err

    return ask


def write_bad(path):
    """A shard with one sample of every kind."""
    words = {"jpg": b"words"}
    cut = shards.encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900]
    return shards.write(
        path,
        [
            {"__key__": "ok", "jpg": shards.jpeg(1), "json": b"{}"},
            {"__key__": "text", "txt": b"words"},
            {"__key__": "words", **words},
            {"__key__": "cut", "png": cut},
            {"__key__": "wide", "jpg": shards.jpeg(2, (100, 2))},
            {"__key__": "same", "jpg": shards.jpeg(3)},
            {"__key__": "b\udcfed", "jpg": shards.jpeg(3)},
            {"__key__": "same", "jpg": shards.jpeg(5)},
            {"__key__": "last", "jpg": shards.jpeg(4)},
        ],
    )


def write_good(path, count=5, start=0):
    samples = [
        {"__key__": f"k{seed}", "jpg": shards.jpeg(seed)} for seed in range(start, start + count)
    ]
    return shards.write(path, samples)


def read(file):
    return json.loads(file.read_text())


def test_every_sample_has_a_caption_or_a_reason(command, tmp_path):
    write_bad(tmp_path / "data" / "0.tar")
    write_good(tmp_path / "data" / "1.tar")
    status, out, _ = command("--json", "--model-name", "colours")
    found = json.loads(out)
    assert status == 1 and not found["is_complete"]
    expected = ("no_image", "not_an_image", "damaged", "refused", "duplicate_key", "bad_name")
    assert found["failures"] == dict.fromkeys(sorted(expected), 1)
    assert (found["samples"], found["captions"], found["shards"]) == (14, 8, 2)
    assert (found["prompt_tokens"], found["tokens"]) == (24, 40)
    assert found["run"]["images"] == 8 and found["run"]["failures"] == 6
    captions = read(tmp_path / "out" / "0.json")
    assert captions == {key: {"colours": text} for key, text in GOOD.items()}
    assert list(captions) == list(GOOD)
    lines = (tmp_path / "out" / "0.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            **{"key": key, "model": "colours", "position": place, "caption": text},
            **{"prompt_tokens": 3, "tokens": 5, "finish": "stop"},
        }
        for place, (key, text) in zip((0, 5, 8), GOOD.items(), strict=True)
    ]
    facts = read(tmp_path / "out" / "0.failures.json")
    named = {kind: [one["key"] for one in samples] for kind, samples in facts["failures"].items()}
    assert named == {
        **{"no_image": ["text"], "not_an_image": ["words"], "damaged": ["cut"]},
        **{"refused": ["wide"], "duplicate_key": ["same"], "bad_name": ["b\\udcfed"]},
    }
    assert facts["failures"]["refused"] == [{"key": "wide", "file": "wide.jpg", "why": WIDE}]
    assert read(tmp_path / "out" / "1.failures.json")["failures"] == {}
    left = sorted(file.name for file in (tmp_path / "out").iterdir())
    kinds = ("failures.json", "json", "jsonl")
    assert left == [*(f"{n}.{kind}" for n in (0, 1) for kind in kinds), "vllm-qoq-caption.json"]


def test_an_image_of_no_sample_is_a_failure_and_what_macos_adds_is_not(command, tmp_path):
    names = ("a.jpg", "._a.jpg", ".b\udcff.jpg", "README")
    members = [(tarfile.TarInfo(name), shards.jpeg(1)) for name in names]
    (tmp_path / "data").mkdir()
    path = shards.write_members(tmp_path / "data" / "0.tar", members)
    status, out, _ = command()
    assert status == 1 and "1 captions of 1 samples" in out
    assert "without a caption: no_key 1; named in *.failures.json" in out
    assert "that were ignored: apple_double 1, no_key 1" in out
    (failed,) = read(tmp_path / "out" / "0.failures.json")["failures"]["no_key"]
    assert (failed["key"], failed["file"]) == (None, ".b\\udcff.jpg")
    status, out, _ = command("--retry-failed")
    assert status == 1 and "busy" not in out, "no engine has anything to do"
    shards.write_members(path, [*members[:2], members[3]])
    for file in (tmp_path / "out").glob("0.*"):
        file.unlink()
    assert command()[0] == 0


def test_a_second_run_does_nothing_and_says_the_same(command, tmp_path, monkeypatch):
    write_bad(tmp_path / "data" / "0.tar")
    first, out, _ = command()
    assert "3 captions of 9 samples" in out and "without a caption: bad_name 1, damaged 1" in out
    assert "images/s" in out and "busy" in out
    monkeypatch.setattr(run, "caption", partial(run.caption.func, make=None))
    second, out, _ = command()
    assert (first, second) == (1, 1)
    assert "3 captions of 9 samples" in out and "busy" not in out


def test_all_captioned_is_status_0_and_the_output_of_jobs_is_one(command, tmp_path):
    for number in range(5):
        write_good(tmp_path / "data" / f"{number}.tar", start=5 * number)
    status, out, _ = command("--num-jobs", "2")
    assert status == 0 and "of all jobs, 3 of 5 shards are finished" in out
    assert command("--num-jobs", "2", "--job-id", "1")[0] == 0
    status, out, _ = command("--json")  # all of both, as one job
    assert status == 0 and json.loads(out)["shards_finished_before"] == 5
    found = [read(tmp_path / "out" / f"{number}.json") for number in range(5)]
    assert [list(one) for one in found] == [[f"k{5 * n + k}" for k in range(5)] for n in range(5)]


def test_several_engines_divide_the_shards(command, tmp_path):
    for number in range(6):
        write_good(tmp_path / "data" / f"{number}.tar", start=5 * number)
    status, out, _ = command("--json", "--engines", "3")
    engines = json.loads(out)["run"]["engines"]
    assert status == 0 and len(engines) == 3
    assert sum(one["images"] for one in engines) == 30
    for one in engines:
        assert 0 <= one["full"] <= one["busy"] <= 1


def test_a_dry_run_counts_and_writes_nothing(command, tmp_path):
    write_bad(tmp_path / "data" / "0.tar")
    write_good(tmp_path / "data" / "1.tar")
    status, out, _ = command("--dry-run", "--json")
    plan = json.loads(out)
    assert status == 0 and not (tmp_path / "out").exists()
    assert (plan["samples"], plan["samples_done"], plan["shards_finished"]) == (14, 0, 0)
    command("--num-jobs", "2", "--job-id", "1")
    status, out, _ = command("--dry-run")
    assert "would caption 1 of 2 shards as tiny" in out
    assert "samples: 14, 5 of them done" in out


def test_a_list_that_promises_more_is_a_failure(command, tmp_path):
    write_good(tmp_path / "data" / "0.tar")
    listed = {"shardlist": [{"url": "0.tar", "nsamples": 7}]}
    (tmp_path / "data" / "metadata_info.json").write_text(json.dumps(listed))
    status, out, _ = command("--json")
    assert status == 1 and json.loads(out)["failures"] == {"missing": 2}


def test_a_shard_that_is_cut_off_is_told(command, tmp_path):
    path = write_good(tmp_path / "data" / "0.tar")
    path.write_bytes(path.read_bytes()[:6000])
    status, out, _ = command()
    assert status == 1 and "0: not readable behind byte" in out
    path.write_bytes(path.read_bytes() + bytes(512))
    status, _, err = command()
    assert status == 2 and "delete 0.* there to caption the new one" in err


@pytest.mark.parametrize(
    "more, says",
    [
        (("--job-id", "1"), "--job-id 1: jobs are counted from 0, and --num-jobs is 1"),
        (("--engine-args", '{"model": "x"}'), "model is not for you to give here"),
        (("--engine-args", '{"tensor_parallel_size": "2"}'), "is not a number of GPUs"),
        (("--prompt", "other"), "prompt was 'Describe this image in detail.' and is 'other' now"),
        (("--max-tokens", "9"), "max_tokens was 256 and is 9 now"),
        (("--engine-args", '{"dtype": "float16"}'), "engine_args was {} and is {'dtype'"),
        (("-o", "{}/data"), "data: holds '0.tar', which is of no captions"),
        (("-o", "{}/none/out"), "none: no such folder; create it first"),
        (("-o", "{}/tiny/config.json"), "is not a folder"),
        (("-o", "{}/tiny/config.json/a/b"), "tiny/config.json: is a file, not a folder"),
        (("--prompt", " "), "argument --prompt: is empty"),
        (("--model", "{}/none"), "none: not a folder"),
    ],
)
def test_wrong_use_is_refused_before_an_engine_starts(command, tmp_path, more, says):
    write_good(tmp_path / "data" / "0.tar", 1)
    assert command()[0] == 0
    before = sorted(tmp_path.rglob("*"))
    status, _, err = command(*(part.replace("{}", str(tmp_path)) for part in more))
    assert status == 2 and says in err, err
    assert sorted(tmp_path.rglob("*")) == before


def test_speed_may_change_between_two_halves(command, tmp_path):
    write_good(tmp_path / "data" / "0.tar", 1)
    assert command()[0] == 0
    assert command("--engine-args", '{"max_num_seqs": 4, "enforce_eager": true}')[0] == 0


@pytest.fixture
def job(tmp_path, model):
    write_good(tmp_path / "data" / "0.tar", 12)
    return Job(str(tmp_path / "data"), tmp_path / "out", model, quiet=True)


def test_two_processes_are_not_the_same_job(job):
    checked = check(job)
    with (
        folder.opened(job.out, checked.run, job.label, checked.division),
        pytest.raises(CaptionError, match=f"there as job-0-of-1: process {os.getpid()} on '.*', s"),
    ):
        run.caption(checked, shards.colours)
    shard = checked.shards[0]
    held = Journal.open(job.out, shard, "tiny", retry=False)
    with pytest.raises(CaptionError, match="the same --num-jobs"):
        run.caption(checked, shards.colours)
    held.close()
    assert run.caption(checked, shards.colours).is_complete


@pytest.mark.parametrize(
    "key, other, says",
    [
        ("num_jobs", 2, "another num jobs runs there: 2, and here it is 1; wait for process"),
        ("list_of_shards", "2 shards", "another list of shards runs there: '2 shards', and here"),
        ("prompt", "other", "another prompt runs there: 'other', and here it is 'Describe"),
    ],
)
def test_jobs_that_run_at_once_agree(job, key, other, says):
    """Also before the first caption."""
    checked, free = check(job), check(replace(job, out=job.out.with_name("free")))
    theirs = {**checked.run, **checked.division, key: other}
    run_of_theirs = {key: theirs.pop(key) for key in checked.run}
    with folder.opened(job.out, run_of_theirs, "job-1-of-2", theirs):
        with pytest.raises(CaptionError) as refused:
            run.caption(checked, shards.colours)
        assert says in str(refused.value)
    with folder.opened(free.job.out, free.run, "job-1-of-2", free.division):
        assert run.caption(free, shards.colours).is_complete
    left = job.out / "vllm-qoq-caption.job-7-of-8.lock"  # of a job that was killed
    left.write_text('{"num_jobs": 8}')
    assert run.caption(checked, shards.colours).is_complete and not left.exists()


def test_a_first_start_that_failed_binds_to_nothing(job):
    with pytest.raises(CaptionError):
        run.caption(check(job), missing)
    Journal.open(job.out, check(job).shards[0], "tiny", retry=False).close()
    other = replace(job, prompt="other", engine_args={"dtype": "float16"})
    assert run.caption(check(other), shards.colours).is_complete
    with pytest.raises(CaptionError, match="prompt was 'other' and is 'Describe"):
        check(job)


def test_who_has_the_folder_is_said_while_a_job_waits(job, monkeypatch, capsys):
    monkeypatch.setattr(folder, "_PATIENCE_SECONDS", 0.1)
    job.out.mkdir()
    path = job.out / "vllm-qoq-caption.lock"
    handle = lock.locked(path)
    lock.sign(handle, {})
    threading.Timer(0.3, os.close, [handle]).start()
    assert run.caption(check(job), shards.colours).is_complete
    said = capsys.readouterr().err
    assert (
        f"{path}: waiting for process {os.getpid()} on " in said and "if it hangs, end it" in said
    )


def test_sigterm_says_what_it_ends_from_the_beginning_on(command, tmp_path, monkeypatch):
    write_good(tmp_path / "data" / "0.tar", 1)
    monkeypatch.setattr(
        "vllm_qoq.caption.job.check", lambda _: os.kill(os.getpid(), signal.SIGTERM)
    )
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        status, _, err = command()
    finally:
        signal.signal(signal.SIGINT, handlers[0])
    assert (status, err) == (130, "interrupted\n")
    assert signal.getsignal(signal.SIGTERM) == handlers[1]


def test_a_model_is_another_with_another_file_that_is_served(model):
    names = ("vocab.txt", "merges.txt", "qwen.tiktoken", "tokenizer.model", "pytorch_model.bin")
    digests = {folder.digest_of(model)}
    for name in names:
        for content in ("one", "two"):
            (model / name).write_text(content)
            digests.add(folder.digest_of(model))
    assert len(digests) == 1 + 2 * len(names)
    (model / "README.md").write_text("words")
    assert folder.digest_of(model) in digests


class Refusing(shards.Colours):
    """An engine that refuses every third image."""

    count = 0

    def add(self, ticket, image, seed):
        self.count += 1
        if self.count % 3 == 0:
            raise Uncaptioned("refused", "too long")
        super().add(ticket, image, seed)


def refusing(_):
    return Refusing()


def test_failed_samples_are_tried_again_where_that_is_asked(command, tmp_path, monkeypatch):
    write_bad(tmp_path / "data" / "0.tar")
    write_good(tmp_path / "data" / "1.tar", 9)
    files = [tmp_path / "out" / f"1.{kind}" for kind in ("json", "jsonl", "failures.json")]
    assert command()[0] == 1
    expected = [file.read_bytes() for file in files]
    for file in (tmp_path / "out").iterdir():
        file.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(run, "caption", partial(run.caption.func, make=refusing))
        assert json.loads(command("--json")[1])["failures"]["refused"] > 2
    left = json.loads(command("--json")[1])
    assert left["run"]["engines"] == [] and left["shards_finished_before"] == 2
    plan = json.loads(command("--json", "--dry-run", "--retry-failed")[1])
    assert plan["shards_finished"] == 0 and files[0].exists()
    found = json.loads(command("--json", "--retry-failed")[1])
    assert (found["captions"], found["failures"]["refused"]) == (3 + 9, 1)
    assert found["run"]["images"] == 12 - left["captions"]
    assert [file.read_bytes() for file in files] == expected
    found = json.loads(command("--json", "--retry-failed")[1])
    assert found["run"]["images"] == 0 and found["shards_finished_before"] == 1


class Failing(shards.Colours):
    """An engine that captions some, and then raises."""

    has_worked = False

    def step(self):
        if self.has_worked:
            raise MemoryError("out of it")
        self.has_worked = True
        while not (done := super().step()):
            pass
        return done


class Dying(shards.Colours):
    def step(self):
        os.kill(os.getpid(), signal.SIGKILL)


def failing(_):
    return Failing()


def dying(_):
    return Dying()


def imageless(_):
    raise CaptionError("takes no images; give another")


def missing(_):
    return Path("/none").read_text()


GOES_ON = "the same command goes on there"
BEGINS = "there are no captions yet; the same command begins anew"


@pytest.mark.parametrize(
    "make, says",
    [
        (
            failing,
            "MemoryError: out of it; its log is {log}; captions so far are in {out}; " + GOES_ON,
        ),
        (dying, "for want of memory; its log is {log}; " + BEGINS),
        (
            missing,
            "/none: No such file or directory; look whether its disk is full or fails; its log "
            "is {log}; " + BEGINS,
        ),
        (imageless, "the engine: takes no images; give another; its log is {log}"),
    ],
)
def test_an_engine_that_fails_ends_the_job_and_what_it_did_stays(job, make, says, capsys):
    with pytest.raises(CaptionError) as failed:
        run.caption(check(replace(job, quiet=False)), make)
    shown = re.findall("([0-9]+) images,", capsys.readouterr().err)
    begun = journal.begun(job.out, check(job).shards[0])
    assert shown[-1:] == ([str(begun)] if begun else [])
    said, log = str(failed.value), job.out / "vllm-qoq-caption.job-0-of-1.engine-0.log"
    assert said.endswith(says.format(log=log, out=job.out)), said
    assert list(job.out.glob("*.log")) and not list(job.out.glob("*.lock"))
    assert run.caption(check(job), shards.colours).is_complete


# Of vLLM 0.32, without the frames.
LOG = """\
(VllmWorker-0 pid=7) ERROR 11-28 07:43:50 [multiproc_executor.py:953] KeyError: 'first'
(VllmWorker-0 pid=7) ERROR 11-28 07:43:50 [multiproc_executor.py:953]     raise ValueError(
(VllmWorker-0 pid=7) ERROR 11-28 07:43:50 [multiproc_executor.py:953] {}
(VllmWorker-0 pid=7) INFO 11-28 07:43:51 [core.py:9] ValueError: of no traceback
(EngineCore pid=6) ERROR 11-28 07:43:52 [core.py:1511] Exception: WorkerProc initialization failed \
due to an exception in a background process. See stack trace for root cause.
Exception: WorkerProc initialization failed. See stack trace for root cause.
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
"""


def test_why_vllm_did_not_start_is_taken_from_its_log(tmp_path):
    log, above = tmp_path / "log", RuntimeError("initialization failed. See root cause above.")
    for said in (
        "ValueError: Free memory is less",
        "torch.OutOfMemoryError: CUDA out",
        "A.BError: x",
    ):
        log.write_text(LOG.format(said))
        assert cause(above, log) == said
        log.write_text(f"(EngineCore pid=6) {said}\n")
        assert cause(above, log) == said
        assert cause(ValueError("its own"), log) == "its own"
    log.write_bytes(b"\xff no error\n")
    assert cause(above, log) == cause(above, None) == str(above)


def in_this_process(shard, out, captioner=None, decoders=2, retry=False):
    """Run a pipeline over one shard."""
    waiting, facts = [shard], []
    report = lambda finished: facts.append(finished) if finished else None  # noqa: E731
    flow = pipeline.Pipeline(
        captioner or shards.Colours(),
        out,
        "tiny",
        lambda: waiting.pop() if waiting else None,
        report,
        decoders,
        retry,
    )
    flow.run()
    return facts, flow.counts


@pytest.fixture
def shard(tmp_path):
    path = write_good(tmp_path / "0.tar", 9)
    (tmp_path / "out").mkdir()
    return find(str(path))[0]


def line(position):
    caption = Caption(caption="earlier", prompt_tokens=1, tokens=1, finish="stop")
    return Line(position=position, key=f"k{position}", caption=caption)


def test_a_part_of_a_line_is_dropped_and_its_sample_done_again(shard, tmp_path):
    begun = Journal.open(tmp_path / "out", shard, "tiny", retry=False)
    begun.append([line(4), line(1)])
    begun.close()
    file = tmp_path / "out" / "0.partial.jsonl"
    whole = file.read_bytes()
    for cut in (1, 5, 60):
        file.write_bytes(whole[:-cut])
        (facts,), counts = in_this_process(shard, tmp_path / "out")
        assert counts.images == 8 and facts.captions == 9
        texts = [one["tiny"] for one in read(tmp_path / "out" / "0.json").values()]
        assert [n for n, text in enumerate(texts) if text == "earlier"] == [4]
        (tmp_path / "out" / "0.json").unlink()
    file.write_bytes(whole[:20])
    assert in_this_process(shard, tmp_path / "out")[1].images == 9


def test_a_shard_that_changed_between_two_runs_is_refused(shard, tmp_path):
    """Also one of the same size."""
    begun = Journal.open(tmp_path / "out", shard, "tiny", retry=False)
    begun.append([line(1).model_copy(update={"key": "another"})])
    begun.close()
    with pytest.raises(CaptionError, match=r"sample 1 is '.*' now, and another when it was"):
        in_this_process(shard, tmp_path / "out")
    assert not (tmp_path / "out" / "0.json").exists()


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_shard_that_another_of_its_size_takes_the_place_of_is_refused(
    shard, tmp_path, is_finished
):
    if is_finished:
        in_this_process(shard, tmp_path / "out")
    else:
        Journal.open(tmp_path / "out", shard, "tiny", retry=False).close()
    os.utime(shard.path, ns=(1, 1))  # as a copy has another time
    (same,) = find(str(shard.path))
    assert same.modified_ns == 1
    if is_finished:
        assert journal.finished(tmp_path / "out", same).captions == 9
    else:
        Journal.open(tmp_path / "out", same, "tiny", retry=False).close()
    content = bytearray(shard.path.read_bytes())
    content[len(content) // 2] ^= 1
    shard.path.write_bytes(content)
    (other,) = find(str(shard.path))
    assert other.bytes == shard.bytes
    with pytest.raises(CaptionError, match=r"another shard of the size of .*; delete 0\.\* there"):
        in_this_process(other, tmp_path / "out")


def test_a_damaged_line_is_refused(shard, tmp_path):
    begun = Journal.open(tmp_path / "out", shard, "tiny", retry=False)
    begun.append([line(4), line(1)])
    begun.close()
    file = tmp_path / "out" / "0.partial.jsonl"
    whole = file.read_bytes()
    for content, says in (
        (whole.replace(b"earlier", b'earl"er'), "line 2"),
        (whole.replace(b'"position": 1', b'"position": 4'), "has sample 4 twice"),
        (bytes(len(whole) - 1) + b"\n", "line 1"),
        (whole.replace(b'"bytes": ', b'"bytes": 1'), "is of a shard of 1"),
    ):
        file.write_bytes(content)
        with pytest.raises(CaptionError, match=says):
            Journal.open(tmp_path / "out", shard, "tiny", retry=False)


def test_a_failed_sample_of_an_unfinished_shard_is_tried_again(shard, tmp_path):
    failed = Line(position=4, key="k4", failure=Failure(kind="engine", why="gave up"))
    begun = Journal.open(tmp_path / "out", shard, "tiny", retry=False)
    begun.append([line(1), failed, failed.model_copy(update={"position": 2, "key": "k2"})])
    begun.close()
    begun = Journal.open(tmp_path / "out", shard, "tiny", retry=False)
    assert sorted(begun.done) == [1, 2, 4]
    begun.close()
    again = Journal.open(tmp_path / "out", shard, "tiny", retry=True)
    assert list(again.done) == [1]
    again.append([line(4)])
    again.close()
    (found,), counts = in_this_process(shard, tmp_path / "out")
    assert (counts.images, found.captions, found.failures) == (6, 8, {"engine": 1})


@pytest.mark.parametrize("step", range(3))
def test_a_kill_while_a_shard_is_opened_again_loses_nothing(shard, tmp_path, monkeypatch, step):
    in_this_process(shard, tmp_path / "out", Refusing())
    (tmp_path / "whole").mkdir()
    in_this_process(shard, tmp_path / "whole")
    file, parts = tmp_path / "out" / "0.json", ("_begin", "append", "_write")
    with monkeypatch.context() as patched:
        if step == 2:
            patched.setattr(Path, "unlink", lambda self, **_: os.unlink(self) or kill())
        else:
            patched.setattr(Journal, parts[step], lambda *_: kill())
        with pytest.raises(KeyboardInterrupt):
            Journal.open(tmp_path / "out", shard, "tiny", retry=True)
    assert file.exists() == (step < 2)
    if step < 2:
        assert journal.finished(tmp_path / "out", shard).failures == {"refused": 3}
    (found,), counts = in_this_process(shard, tmp_path / "out", retry=True)
    assert counts.images == 3 and found.is_complete
    for kind in ("json", "jsonl", "failures.json"):
        names = [tmp_path / folder / f"0.{kind}" for folder in ("out", "whole")]
        assert names[0].read_bytes() == names[1].read_bytes()


def kill():
    raise KeyboardInterrupt  # nothing catches it on the way


@pytest.mark.parametrize("step", range(4))
def test_a_kill_while_a_shard_is_finished_loses_nothing(shard, tmp_path, monkeypatch, step):
    """Of the three files and the one that goes, each is the last that was done."""
    in_this_process(shard, tmp_path / "out")
    names = ("0.jsonl", "0.failures.json", "0.json")
    expected = [(tmp_path / "out" / name).read_bytes() for name in names]
    for name in names:
        (tmp_path / "out" / name).unlink()
    done = []

    def stop(act, *arguments, **more):
        if len(done) == step:
            raise KeyboardInterrupt  # nothing catches it on the way
        done.append(act)
        return act(*arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(journal, "clean", partial(stop, journal.clean))
        patched.setattr(Path, "replace", lambda self, to: stop(os.replace, self, to))
        with pytest.raises(KeyboardInterrupt):
            in_this_process(shard, tmp_path / "out")
    assert (tmp_path / "out" / "0.partial.jsonl").exists()
    assert (journal.finished(tmp_path / "out", shard) is not None) == (step == 3)
    facts, counts = in_this_process(shard, tmp_path / "out")
    assert counts.images == 0 and len(facts) == (step != 3)
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == expected
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(names)


def test_a_failing_write_ends_the_pipeline_and_what_was_written_stays(shard, tmp_path, monkeypatch):
    write, calls = os.pwrite, []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match="No space left on device") as failed:
        in_this_process(shard, tmp_path / "out")
    assert failed.value.filename == str(tmp_path / "out" / "0.partial.jsonl")
    (facts,), _ = in_this_process(shard, tmp_path / "out")
    assert facts.captions == 9


def test_a_disk_that_fails_is_not_taken_for_a_damaged_shard(shard, tmp_path, monkeypatch):
    read_at, reads = os.pread, []

    def fail(*arguments):
        reads.append(arguments)
        if len(reads) == 4:
            raise OSError(5, "Input/output error")
        return read_at(*arguments)

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match="Input/output error") as failed:
        in_this_process(shard, tmp_path / "out")
    assert failed.value.filename == str(shard.path)
    (facts,), _ = in_this_process(shard, tmp_path / "out")
    assert facts.is_complete


def test_a_shard_that_another_process_has_finished_meanwhile_is_left(job):
    checked = check(job)
    with folder.opened(job.out, checked.run, "job-x", checked.division):
        in_this_process(checked.shards[0], job.out)
    assert run.caption(checked, failing).is_complete


def test_memory_is_bounded_while_the_engine_is_slow(tmp_path):
    """Of 400 images of 1 MB, only what queues hold is decoded before the engine takes it."""
    samples = [{"__key__": f"k{n}", "jpg": shards.jpeg(n, (640, 512))} for n in range(400)]
    path = shards.write(tmp_path / "0.tar", samples)
    (tmp_path / "out").mkdir()
    decoded = []

    class Waiting(shards.Colours):
        def add(self, ticket, image, seed):
            if ticket == 0:
                while len(decoded) < len(samples):
                    before = len(decoded)
                    time.sleep(0.2)
                    if len(decoded) == before:
                        break
                self.most = len(decoded)
            super().add(ticket, image, seed)

    captioner, decode = Waiting(capacity=6), pipeline.decode
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline, "decode", lambda content: decoded.append(1) or decode(content))
        (facts,), _ = in_this_process(find(str(path))[0], tmp_path / "out", captioner)
    # The one that was taken, a full queue, and what the two threads have in hand.
    assert captioner.most == 1 + 6 + 2 and facts.captions == 400


def test_a_queue_is_full_by_number_or_by_weight():
    queue = Bounded(3, 100)
    queue.put("heavy", 500)  # one always fits
    taken = []

    def put():
        for item, weight in (("a", 60), ("b", 60), ("c", 1)):
            queue.put(item, weight)
            taken.append(item)

    thread = threading.Thread(target=put)
    thread.start()
    time.sleep(0.05)
    assert taken == []
    assert queue.get() == "heavy"
    time.sleep(0.05)
    assert taken == ["a"]
    assert [queue.get(), queue.get(), queue.get()] == ["a", "b", "c"]
    thread.join()
    assert queue.get(0.01) is None
    queue.put("last")
    queue.close()
    assert queue.get() == "last"
    for use in (queue.get, partial(queue.put, "x")):
        with pytest.raises(Closed):
            use()


def test_engines_get_gpus_of_their_own(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.groups(None, 1) == ["0", "1", "2", "3"]
    assert devices.groups(None, 2) == ["0,1", "2,3"]
    assert devices.groups(1, 2) == ["0,1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-a,7,6")
    assert devices.groups(None, 1) == ["5", "GPU-a", "7", "6"]
    with pytest.raises(CaptionError, match="4 GPUs are visible"):
        devices.groups(3, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices.groups(None, 1) == [None] and devices.groups(2, 1) == [None, None]


def test_engines_on_a_cpu_get_processors_of_their_own(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 1, 2, 3, 5})
    assert devices.processors(2) == [{1, 2}, {3, 5}]
    assert devices.processors(6) == [{1, 2, 3, 5, 7}] * 6


def alone(request):
    """An engine that fails where it may use what others may."""
    assert request.processors == os.sched_getaffinity(0)
    return shards.Colours()


def test_the_processes_of_several_engines_are_bound(job, tmp_path):
    write_good(tmp_path / "data" / "1.tar")
    assert run.caption(check(replace(job, engines=2)), alone).is_complete


def test_progress_is_a_line_now_and_then_and_on_a_terminal_a_bar(capsys):
    clock = iter((0.0, 5.0, 11.0, 12.0, 25.0))
    counts = pipeline.Counts(images=40, seconds=10.0, done_bytes=300, skipped_bytes=100)
    counts.failures["damaged"] = 2
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(time, "monotonic", lambda: next(clock))
        with status.shown(1000, 4, quiet=False) as shown:
            shown.show([counts], 1)
            shown.show([pipeline.Counts()], 0)  # no engine has begun
            shown.show([counts, pipeline.Counts()], 1)
            shown.show([counts, counts], 3)
    with status.shown(1000, 4, quiet=True) as shown:
        shown.show([counts], 1)
    assert capsys.readouterr().err.splitlines() == [
        "captions: 1 of 4 shards, 40 images, 4.0 images/s, 2 failed, about 20 s left",
        "captions: 3 of 4 shards, 80 images, 8.0 images/s, 4 failed, about 3 s left",
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.stderr.isatty", lambda: True)
        with status.shown(1000, 4, quiet=False) as shown:
            shown.show([counts], 1)
            assert shown.bar.n == 400
    assert "1/4 shards, 40 images, 2 failed" in capsys.readouterr().err


def test_the_page_goes_from_a_folder_of_images_to_a_dataset(command, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "captioning.md").read_text()
    make, use = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images" / "v1.0").mkdir(parents=True)
    (tmp_path / "shards").mkdir()
    for seed, name in enumerate(("a.b.jpg", "c.jpg", "v1.0/c.jpg")):
        (tmp_path / "images" / name).write_bytes(shards.jpeg(seed))
    (tmp_path / "images" / "d.jpg").write_bytes(b"words")
    exec(make, {})
    assert command("-o", "captions", "--model-name", "CKPT", data="shards")[0] == 1
    found = {}
    exec(use, found)
    captions = {one["__key__"]: one["caption"] for one in found["dataset"]}
    assert captions == {
        **{"a_b": "24 x 16, 0 0 0", "c": "24 x 16, 1 0 0"},
        "v1_0/c": "24 x 16, 2 0 0",
    }
