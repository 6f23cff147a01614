"""Ids of the Hugging Face Hub in the place of folders, against a server on this machine."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from conftest import DATA, ROOT
from hub_server import REPOSITORY, TOKEN, hub_server
from huggingface_hub import constants, file_download
from huggingface_hub.utils import are_progress_bars_disabled
from qoq_checkpoints import write_plain

import vllm_qoq
from vllm_qoq.bench import perplexity
from vllm_qoq.bench.evaluate import job as evaluate_job
from vllm_qoq.checkpoint import hub, transforms
from vllm_qoq.checkpoint.folder import Checkpoint, side_files
from vllm_qoq.cli.main import main
from vllm_qoq.quantizer import inputs
from vllm_qoq.quantizer.calibrate_kv import local_model, open_source
from vllm_qoq.quantizer.plan import Job

TINY = DATA / "tiny-llama"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SIDE = {
    "LICENSE": b"Take it.",
    "README.md": b"---\nlicense: mit\n---\n",
    "chat_template.jinja": b"{{ messages }}",
    "1_Pooling/config.json": b"{}",
}
NOT_WANTED = {
    "consolidated.safetensors": b"Mistral's own",
    "pytorch_model.bin": b"a pickle",
    "pytorch_model.bin.index.json": b"{}",
    "model.pt": b"a pickle",
    "model-q4.gguf": b"GGUF",
    "modeling_name.py": b"raise SystemExit",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    ".gitattributes": b"",
    "video.mp4": b"long",
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def connect(monkeypatch, url, cache):
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache.parent / "no token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub with the test model and all that may lie beside one; the cache is `tmp_path/hub`."""
    with hub_server({**files_of(TINY), **SIDE, **NOT_WANTED}) as running:
        connect(monkeypatch, running.url, tmp_path / "hub")
        monkeypatch.chdir(tmp_path)
        yield running


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("org/name", ("org/name", None)),
        ("Org-1/n_a.m-e@v1.0", ("Org-1/n_a.m-e", "v1.0")),
        ("org/name@refs/pr/3", ("org/name", "refs/pr/3")),
        ("name", None),
        ("./org/name", None),
        ("../name", None),
        ("/org/name", None),
        ("a/b/c", None),
        ("org/name@", None),
        ("org/name@../../x", None),
        ("org/..", None),
        ("https://huggingface.co/org/name", None),
        ("org/näme", None),
        ("org/name\n", None),
    ],
)
def test_an_id_is_told_from_a_path(value, found):
    parsed = hub.HubId.parse(value)
    assert (parsed and (parsed.repository, parsed.revision)) == found
    assert parsed is None or str(parsed) == value


def test_only_what_the_tools_read_is_downloaded(server):
    folder = hub.local_folder(REPOSITORY)
    assert files_of(folder) == {**files_of(TINY), **SIDE}
    assert not server.downloads.keys() & NOT_WANTED.keys()
    checkpoint = Checkpoint.open(folder)
    checkpoint.check_links()
    names = sorted({*files_of(TINY), *SIDE} - {"config.json", "model.safetensors", "README.md"})
    assert (folder / "config.json").is_symlink() and list(map(str, side_files(folder))) == names
    assert hub.name_of(folder) == REPOSITORY and hub.name_of(TINY) == "tiny-llama"


def test_what_is_in_the_cache_is_not_downloaded_again(server, monkeypatch):
    folder = hub.local_folder(REPOSITORY)
    assert set(server.downloads.values()) == {1}
    assert hub.local_folder(REPOSITORY) == folder
    offline(monkeypatch)
    assert hub.local_folder(REPOSITORY) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.status = 503
    assert hub.local_folder(REPOSITORY) == folder
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.local_folder(REPOSITORY) == folder
    assert set(server.downloads.values()) == {1}


def test_the_transforms_of_the_weights_come_along(server, monkeypatch):
    """A server asks for them before it downloads anything, and in the cache without the Hub."""
    assert not hub.has_file(REPOSITORY, None, transforms.FILE)
    assert hub.one_file(REPOSITORY, None, transforms.FILE) is None
    server.files[transforms.FILE] = b"how"
    assert hub.has_file(REPOSITORY, None, transforms.FILE)
    assert (hub.local_folder(REPOSITORY) / transforms.FILE).read_bytes() == b"how"
    offline(monkeypatch)
    assert hub.has_file(REPOSITORY, None, transforms.FILE)
    assert hub.one_file(REPOSITORY, None, transforms.FILE).read_bytes() == b"how"
    assert hub.one_file(REPOSITORY, None, "other.safetensors") is None
    assert not hub.has_file(REPOSITORY, None, "other.safetensors")
    assert not hub.has_file("s3://bucket/model", None, transforms.FILE)


def test_a_revision_is_downloaded(server):
    server.revisions |= {"v1.0": "b" * 40, "refs/pr/3": "c" * 40}
    assert hub.local_folder(f"{REPOSITORY}@v1.0").name == "b" * 40
    assert hub.local_folder(f"{REPOSITORY}@refs/pr/3").name == "c" * 40
    assert hub.local_folder(f"{REPOSITORY}@{'b' * 40}").name == "b" * 40
    assert hub.local_folder(REPOSITORY).name == "a" * 40


def test_without_weights_none_come(server):
    folder = hub.local_folder(REPOSITORY, has_weights=False)
    assert "config.json" in files_of(folder) and "model.safetensors" not in files_of(folder)


def test_the_index_says_which_shards_come(server):
    index = {"weight_map": dict(zip("ab", SHARDS, strict=True))}
    server.files |= dict.fromkeys(SHARDS, b"weights")
    server.files |= {"model.safetensors.index.json": json.dumps(index).encode()}
    folder = hub.local_folder(REPOSITORY)
    assert set(SHARDS) < files_of(folder).keys() and not server.downloads["model.safetensors"]
    del server.files[SHARDS[1]]
    server.revisions["main"] = "b" * 40
    with pytest.raises(hub.HubError, match=rf"index\.json names '{SHARDS[1]}', which the repo"):
        hub.local_folder(REPOSITORY)


def test_a_path_that_exists_wins(server, tmp_path):
    (tmp_path / "org").mkdir()
    (tmp_path / REPOSITORY).symlink_to("nothing")
    assert hub.local_folder(REPOSITORY) == Path(REPOSITORY)
    assert hub.local_folder(TINY) == TINY and not server.downloads
    assert not hub.is_to_download(REPOSITORY) and hub.is_to_download("org/other")


@pytest.mark.parametrize("value", ["typo", "./org/name", "/typo/model", "x" * 5000, "a/b/c"])
def test_what_is_neither_is_refused(server, value):
    with pytest.raises(hub.HubError, match=r"neither a folder, .*, nor an id .*; check the path"):
        hub.local_folder(value)


def fails(message: str, value: str = REPOSITORY) -> None:
    with pytest.raises(hub.HubError, match=message) as caught:
        hub.local_folder(value)
    assert str(caught.value).startswith(f"{value}: ") and "\n" not in str(caught.value)


def test_a_repository_that_is_not_there_is_refused(server):
    fails("neither a folder, .* nor a repository on the Hub .*; check the name", "org/other")
    fails("neither a folder, .* nor an id .*; check the path", "org/--name")


def test_a_revision_that_is_not_there_is_refused(server):
    fails("has no revision v9; give a branch, tag or commit that http.*", f"{REPOSITORY}@v9")
    fails("has no revision 1111", f"{REPOSITORY}@{'1' * 40}")


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ("conditions", r"is gated; ask for access at http://.*/org/name, then log in with `hf"),
        ("token", "nor a repository on the Hub that you may read; .* log in with `hf auth login`"),
    ],
)
def test_a_token_is_asked_for_and_used(server, monkeypatch, needs, message):
    server.needs = needs
    fails(message)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub.local_folder(REPOSITORY).is_dir()


@pytest.mark.parametrize("status", [403, 429])
def test_a_refusal_is_explained(server, status):
    server.status = status
    fails(rf"\({status}\); .*log in with `hf auth login` or set HF_TOKEN")


def test_offline_and_not_in_the_cache_is_refused(server, monkeypatch):
    offline(monkeypatch)
    fails("because HF_HUB_OFFLINE is set, and its cache lacks this model; run it once with HF_HUB")
    assert not server.downloads


def test_a_hub_that_cannot_be_reached_is_named(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    fails(r"\(http://127.0.0.1:9\) cannot be reached, .* lacks this model; check the connection")


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"pytorch_model.bin"}, r"pytorch_model\.bin: pickle files can run code .*; convert"),
        ({"model-q4.gguf"}, "the repository: has no .safetensors file; give a model that has"),
        ({"consolidated.safetensors"}, r"holds no whole model in the format of Hugging Face"),
    ],
)
def test_without_weights_that_are_read_nothing_is_downloaded(server, kept, message):
    for name in {"model.safetensors", *NOT_WANTED} - kept:
        del server.files[name]
    fails(message)
    assert not server.downloads


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_disk_that_is_too_small_is_refused_before_the_weights(server, monkeypatch):
    full = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: full)
    fails(r"MB are to be downloaded to .*/hub, but 1.0 kB are free; make room, or set HF_HOME")
    assert not server.downloads["model.safetensors"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no room left in .*/hub; make room, or set HF_HOME to another disk"),
        (errno.EACCES, "cannot write to .*/hub; get the right to it, or set HF_HOME"),
        (
            errno.EIO,
            r"the download broke off \(.*\); finished files stay in the cache, and the same",
        ),
    ],
)
def test_an_error_of_the_disk_is_explained(server, monkeypatch, number, message):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(file_download, "http_get", fail)
    fails(message)


def test_a_download_that_breaks_off_goes_on(server, monkeypatch):
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)  # between its attempts
    server.cut["model.safetensors"] = 1000
    fails(r"the download broke off \(.*\); finished files stay in .* the same command goes on")
    offline(monkeypatch)
    fails("HF_HUB_OFFLINE is set, and its cache lacks 'model.safetensors'; run it once with")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.cut.clear()
    server.downloads.clear()
    folder = hub.local_folder(REPOSITORY)
    assert server.downloads == {"model.safetensors": 1}
    assert files_of(folder) == {**files_of(TINY), **SIDE}


def test_an_interrupt_says_that_the_download_goes_on(server, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupt)
    monkeypatch.setattr("signal.signal", lambda *args: None)
    monkeypatch.setattr(sys, "argv", ["vllm-qoq", "inspect", REPOSITORY])
    assert main() == 130
    assert (
        "finished files stay in the cache, and the same command goes on" in capsys.readouterr().err
    )


def test_bars_are_shown_unless_quiet(server, monkeypatch):
    seen = []
    real = huggingface_hub.snapshot_download

    def spy(*args, **kwargs):
        seen.append(are_progress_bars_disabled())
        return real(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", spy)
    hub.local_folder(REPOSITORY, quiet=True)
    hub.local_folder(REPOSITORY, quiet=False)
    assert seen == [True, True, False, False] and not are_progress_bars_disabled()


def test_no_bar_of_another_library_follows_those_of_the_download():
    program = (
        "from tqdm import tqdm; from vllm_qoq.quantizer.noise import hide_bars\n"
        "hide_bars(owns_process=True); list(tqdm(range(9)))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["vllm-qoq", *map(str, arguments), "--quiet"])
    code = main()
    return code, capsys.readouterr()


def test_inspect_and_verify_take_an_id(server, monkeypatch, capsys, w4a8_dir):
    server.files = files_of(w4a8_dir)
    code, said = run(monkeypatch, capsys, "inspect", REPOSITORY)
    assert code == 0 and said.out.startswith(f"{REPOSITORY}  LlamaForCausalLM"), said
    code, said = run(monkeypatch, capsys, "verify", f"{REPOSITORY}@main")
    assert (code, said.out) == (0, f"{REPOSITORY}@main: verified\n")
    assert vllm_qoq.inspect(REPOSITORY)["sets"].keys() == {"w4a8"}
    assert vllm_qoq.verify(REPOSITORY).findings == ()


def test_evaluate_takes_ids_and_names_the_models_by_them(server, w4a8_dir, heldout_text):
    server.files = files_of(w4a8_dir)
    folders = evaluate_job.local_folders(f"{REPOSITORY}@main", REPOSITORY, heldout_text, quiet=True)
    assert [hub.name_of(folder) for folder in folders] == [REPOSITORY] * 2


def test_calibrate_kv_takes_an_id(server, tiny_model, heldout_text, tmp_path):
    server.files = files_of(tiny_model)
    given = (f"{REPOSITORY}@main", tmp_path / "out", heldout_text)
    folder = local_model(*given, overwrite=False, quiet=True)
    assert open_source(folder).inputs.dimensions.layers == 2
    server.files = {}
    with pytest.raises(vllm_qoq.UserError, match="overlaps the input"):
        local_model(folder, folder / "out", heldout_text, overwrite=False, quiet=True)


def test_perplexity_hands_an_id_and_its_revision_to_vllm(monkeypatch, heldout_text):
    asked = []

    def engine(model, **options):
        asked.append((model, options.get("revision"), options.get("tokenizer_revision")))
        raise RuntimeError("enough")

    monkeypatch.setattr(perplexity, "LLM", engine)
    for given in (REPOSITORY, f"{REPOSITORY}@v1", TINY):
        with pytest.raises(vllm_qoq.UserError, match="vLLM did not start: enough"):
            perplexity.perplexity(given, heldout_text)
    assert asked == [(REPOSITORY, None, None), (REPOSITORY, "v1", "v1"), (str(TINY), None, None)]


def test_perplexity_takes_a_share_of_the_memory(monkeypatch, heldout_text, capfd):
    asked = []

    def engine(model, **options):
        asked.append(options.get("gpu_memory_utilization", "vLLM's"))
        raise RuntimeError("enough")

    monkeypatch.setattr(perplexity, "LLM", engine)
    command = ["vllm-qoq", "perplexity", str(TINY), "--text", str(heldout_text)]

    def said(*more):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        code = main()
        return code, capfd.readouterr().err

    for more in ((), ("--gpu-memory-utilization", "0.3")):
        assert "enough" in said(*more)[1]
    assert asked == ["vLLM's", 0.3]
    for wrong in ("0", "1.5", "all"):
        with pytest.raises(SystemExit):
            said("--gpu-memory-utilization", wrong)
        assert f"'{wrong}' is no" in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [("tune", "org/name@v1"), ("bench", "serving", "org/name@v1", "-o", "OUT")],
    ids=lambda arguments: arguments[0],
)
def test_what_takes_folders_only_says_how_to_download_a_revision(arguments, monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, *arguments)
    assert code == 2 and "`hf download org/name --revision v1 --local-dir name`" in said.err


def test_merge_takes_an_id(server, monkeypatch, capsys, tiny_model, tmp_path):
    server.files = files_of(write_plain(tiny_model, tmp_path / "plain"))
    out = tmp_path / "org" / "out"  # beside where a folder of the id's name would be
    out.parent.mkdir()
    source = f"w4a8={REPOSITORY}@main"
    code, said = run(monkeypatch, capsys, "merge", source, "-o", tmp_path, "--overwrite")
    assert code == 2 and "holds the current folder" in said.err and not server.downloads
    code, said = run(monkeypatch, capsys, "merge", source, "-o", out)
    assert code == 0, said.err
    assert vllm_qoq.verify(out).findings == ()
    assert f'base_model: ["{REPOSITORY}"]' in (out / "README.md").read_text()
    assert not any(path.is_symlink() for path in out.iterdir())


def test_import_takes_ids_and_only_the_config_of_the_base(server, monkeypatch, capsys, tmp_path):
    code, said = run(
        monkeypatch, capsys, "import", REPOSITORY, "--base", REPOSITORY, "-o", tmp_path / "out"
    )
    # Both have come; the test model is not quantized.
    assert code == 2 and "not a checkpoint of QServe" in said.err
    assert server.downloads["model.safetensors"] == 1
    code, said = run(monkeypatch, capsys, "import", "typo", "--base", "o/x", "-o", tmp_path / "o")
    assert code == 2 and "typo: neither a folder" in said.err


def test_quantize_takes_an_id_after_everything_else_is_checked(server, tmp_path):
    text = DATA / "heldout.txt"
    job = Job(Path("unused"), tmp_path / "out", tmp_path / "typo", tmp_path / "work", quiet=True)
    with pytest.raises(vllm_qoq.UserError, match=r"--text .*typo: no such file"):
        inputs.with_local_model(job, REPOSITORY)
    assert not server.downloads
    job = inputs.with_local_model(
        Job(Path("unused"), tmp_path / "out", text, tmp_path / "work", quiet=True), REPOSITORY
    )
    assert inputs.check_inputs(job).linears and hub.name_of(job.model) == REPOSITORY


def test_the_environment_of_the_library_is_obeyed(tmp_path, server, w4a8_dir):
    """HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME, which are read when the library is imported."""
    server.files = files_of(w4a8_dir)
    command = [sys.executable, "-m", "vllm_qoq.cli", "inspect", REPOSITORY, "--json"]
    home = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    for name in ("HF_HUB_CACHE", "HF_TOKEN"):
        home.pop(name, None)
    online = {**home, "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
    for environment in (online, {**home, "HF_HUB_OFFLINE": "1"}):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert json.loads(done.stdout)["checkpoint"] == REPOSITORY, done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_folders_do_not_import_the_library():
    program = (
        "import sys\nfrom vllm_qoq.cli.main import main\n"
        f"sys.argv = ['vllm-qoq', 'inspect', {str(TINY)!r}]\nmain()\n"
        "import vllm_qoq.checkpoint.hub\nprint('huggingface_hub' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr
