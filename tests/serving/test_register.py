"""What the plugin does to a vLLM that it does not know, and to one that serves other models."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from conftest import ROOT
from vllm.config import VllmConfig
from vllm.model_executor.layers.quantization import get_quantization_config

import vllm_qoq
from vllm_qoq import environment
from vllm_qoq.errors import EngineError
from vllm_qoq.serving.plugin.config import QoQConfig

SCRIPT = ROOT / "tests" / "support" / "unknown_vllm.py"
# Without these there is nothing to register with.
NEEDED = (
    "vllm.model_executor.layers.quantization.register_quantization_config",
    "vllm.model_executor.layers.quantization.base_config.QuantizationConfig",
)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out = tmp_path_factory.mktemp("unknown") / "results.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(out)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_registering_brings_names_and_nothing_else(seen):
    """No module of vLLM's or torch's, none of ours that makes ops, files or threads."""
    assert seen["footprint"] == {
        "logged": [],
        "modules": [
            *("vllm_qoq", "vllm_qoq.cards"),
            *(f"vllm_qoq.checkpoint{name}" for name in ("", ".format", ".kv_config")),
            *(
                f"vllm_qoq.{name}"
                for name in ("environment", "errors", "kernel_library", "numerics")
            ),
            *(f"vllm_qoq.routing{name}" for name in ("", ".table")),
            *(f"vllm_qoq.serving{name}" for name in ("", ".plugin")),
            *(f"vllm_qoq.serving.plugin.{name}" for name in ("flex_models", "register")),
            *("vllm_qoq.toolkit", "vllm_qoq.version"),
        ],
        "finders": 0,
    }


def test_without_any_name_other_models_are_served_and_ours_are_refused_with_the_reason(seen):
    assert len(seen["without"]) > 50
    for name, result in seen["without"].items():
        logged, refusal = result["logged"], result["refusal"]
        assert len(logged) <= 1, (name, logged)
        if logged:
            assert "does not work with this vLLM, 9.9.9" in logged[0], name
            assert "install vLLM 0.26 to 0.33" in logged[0], name
        if name in NEEDED:
            assert logged, name
        else:
            assert refusal is not None, f"{name} is imported, but nobody missed it"
            assert refusal.startswith("EngineError: vllm-qoq "), (name, refusal)
            assert "9.9.9" in refusal and "install vLLM 0.26 to 0.33" in refusal, (name, refusal)
            assert name.rpartition(".")[2] in refusal, (name, refusal)


def test_whatever_registering_raises_is_one_line_and_no_error(monkeypatch, vllm_log):
    def fail():
        raise RuntimeError("something\nof several lines")

    monkeypatch.setattr("vllm_qoq.serving.plugin.register.register_with_vllm", fail)
    monkeypatch.setattr(vllm_qoq, "_is_registered", False)
    vllm_qoq.register()
    vllm_qoq.register()
    (line,) = vllm_log
    assert len(line.splitlines()) == 1
    assert "does not work with this vLLM" in line and "RuntimeError: something" in line


def test_the_registered_class_makes_our_config():
    vllm_qoq.register()
    registered = get_quantization_config("qoq")
    section = {"quant_method": "qoq", "kv_cache": {"bits": 4}}
    assert isinstance(registered.from_config(section), QoQConfig)
    assert isinstance(registered(), QoQConfig)
    assert registered.override_quantization_method({"quant_method": "fp8"}, None) is None
    with pytest.raises(EngineError, match=r"kv_cache\.bits"):
        registered.from_config(section | {"kv_cache": {"bits": 5}})


@pytest.mark.parametrize(
    ("version", "is_served"),
    [
        ("0.25.3", False),
        ("0.26.0", True),
        ("0.33.1+cu130", True),
        ("0.34.0rc1", False),
        ("1.0", False),
        ("dev", True),
    ],
)
def test_versions_that_were_tested(version, is_served):
    assert environment.is_served(version) is is_served


def test_the_package_offers_no_stat_logger_to_every_model():
    groups = {group: entry_points(group=group) for group in entry_points().groups}
    ours = {group for group, points in groups.items() for p in points if "vllm_qoq" in p.value}
    assert ours <= {"vllm.general_plugins", "console_scripts"}


@pytest.mark.parametrize(
    ("additional", "is_warned"), [({"qoq": {"kv_bits": 4}}, True), ({"x": 1}, False), ({}, False)]
)
def test_options_of_ours_for_another_model_are_warned_of(
    additional, is_warned, monkeypatch, vllm_log
):
    class EngineCore:
        """Loads plugins as vLLM's engine does in a process of its own."""

        def __init__(self, vllm_config):
            vllm_qoq.register()

    monkeypatch.setattr(vllm_qoq, "_is_registered", False)
    EngineCore(VllmConfig(additional_config=additional))
    assert any("'qoq' is ignored" in line for line in vllm_log) is is_warned


@pytest.mark.parametrize(
    ("plugins", "is_allowed"), [(None, True), ("other,qoq", True), ("other", False), ("", False)]
)
def test_it_is_a_fact_when_vllm_is_told_to_leave_the_plugin_out(monkeypatch, plugins, is_allowed):
    if plugins is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    assert environment.describe()["plugin_allowed"] is is_allowed
    assert os.environ.get("VLLM_PLUGINS") == plugins
