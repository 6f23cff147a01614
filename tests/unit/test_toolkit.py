"""Finding CUDA's toolkit, and what builds say where it does not do."""

import pytest
from toolkits import FOR_ALL, make_toolkit

from vllm_qoq import toolkit


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path, monkeypatch):
    """A machine whose only toolkits are those of the test."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "links"))
    monkeypatch.setattr(toolkit, "_USUAL", tmp_path / "usual")


def test_the_toolkit_has_headers_and_nvcc_in_the_path_may_be_a_script_elsewhere(
    tmp_path, monkeypatch
):
    make_toolkit(tmp_path / "real")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "nvcc").symlink_to(tmp_path / "real" / "bin" / "nvcc")
    found = toolkit.find()
    assert found.home == tmp_path / "real" and found.version == "13.0"
    assert found.architectures().split() == FOR_ALL.split()
    (tmp_path / "real" / "include" / "cuda_runtime.h").unlink()
    with pytest.raises(toolkit.ToolkitError, match=r"real has nvcc, but no include/cuda_runtime"):
        toolkit.find()
    make_toolkit(tmp_path / "usual")
    assert toolkit.find().home == tmp_path / "usual"
    make_toolkit(tmp_path / "named", release="release 14.1, V14.1.2")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "named"))
    assert toolkit.find().release == (14, 1)


def test_no_toolkit_is_said_with_where_it_was_looked_for(tmp_path, monkeypatch):
    with pytest.raises(
        toolkit.ToolkitError, match=r"no nvcc in PATH or .*usual; install the toolk"
    ):
        toolkit.find()
    make_toolkit(tmp_path / "usual")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "gone"))
    with pytest.raises(toolkit.ToolkitError, match=r"no nvcc in CUDA_HOME=.*gone; "):
        toolkit.find()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "#!/bin/sh\necho release 12.8, V12.8.1",
            "nvcc is of CUDA 12.8; install the toolkit of CUDA 13",
        ),
        ("#!/bin/sh\necho nothing", "does not say which version"),
        ("#!/bin/sh\necho no licence >&2; exit 3", "--version fails: no licence"),
        ("#!/bin/nowhere", "does not run: .*No such file"),
    ],
)
def test_an_nvcc_that_does_not_do_is_named(tmp_path, content, said):
    make_toolkit(tmp_path / "usual")
    nvcc = tmp_path / "usual" / "bin" / "nvcc"
    nvcc.write_text(content)
    with pytest.raises(toolkit.ToolkitError, match=said):
        toolkit.find()
    nvcc.chmod(0o644)
    with pytest.raises(toolkit.ToolkitError, match=r"does not run: .*Permission denied"):
        toolkit.find()
