"""The table of GPUs, and what a build tells nvcc of them."""

from types import SimpleNamespace

import pytest
import torch

from vllm_qoq import cards
from vllm_qoq.ops import kv_ops

SM90A = ["-gencode=arch=compute_90a,code=sm_90a"]
ALL = "compute_80 compute_90 compute_100 compute_120"


def test_a_gpu_is_built_for_as_its_family():
    build = cards.build_for("8.0;8.6, 8.9 12.1+PTX")
    assert build.hopper_flags is None
    assert build.flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    assert build.codes == ["sm_80", "sm_120", "compute_120"]


@pytest.mark.parametrize("name", ["9.0", "9.0a"])
def test_hopper_has_files_of_its_own(name):
    build = cards.build_for(name)
    assert build.hopper_flags == SM90A
    assert build.flags == ["-gencode=arch=compute_90,code=sm_90", "-DQOQ_HOPPER"]
    assert build.codes == ["sm_90", "sm_90a"]


def test_a_portable_build_has_no_hopper_path_and_tells_all_files():
    build = cards.build_for("9.0", is_portable=True)
    assert build.hopper_flags is None
    assert build.flags == ["-gencode=arch=compute_90,code=sm_90", "-DQOQ_PORTABLE"]
    assert cards.gemm_path((9, 0), build.codes) == "portable"


@pytest.mark.parametrize("asked", ["7.5", "8.0;sm_90", "11.0", "Hopper", "", ";"])
def test_what_is_no_gpu_of_ours_is_refused(asked):
    with pytest.raises(ValueError, match=r"compute capability.*Ampere and Ada \(8\.x\)"):
        cards.build_for(asked)


@pytest.mark.parametrize(
    ("environment", "present", "nvcc", "asked"),
    [
        ({"VLLM_QOQ_CUDA_ARCHS": "8.0", "TORCH_CUDA_ARCH_LIST": "9.0"}, [(12, 0)], ALL, "8.0"),
        ({"TORCH_CUDA_ARCH_LIST": "7.5 8.0 9.0+PTX"}, [(12, 0)], ALL, "8.0;9.0+PTX"),
        ({"TORCH_CUDA_ARCH_LIST": "Turing;Ampere Hopper"}, [], ALL, "8.0;8.6+PTX;9.0+PTX"),
        ({"TORCH_CUDA_ARCH_LIST": "native"}, [(8, 6)], ALL, "8.6"),
        ({}, [(9, 0), (8, 9), (9, 0), (7, 5)], ALL, "8.9;9.0"),
        ({"VLLM_QOQ_CUDA_ARCHS": "all"}, [(9, 0)], ALL, "8.0+PTX;9.0;10.0;12.0+PTX"),
        ({}, [(7, 5)], ALL, "8.0+PTX;9.0;10.0;12.0+PTX"),
        ({}, [(13, 0)], ALL, "12.0+PTX"),
        ({}, [(8, 0), (11, 0)], ALL, "8.0;8.0+PTX"),
        (
            {"TORCH_CUDA_ARCH_LIST": "7.5;8.0;9.0a;11.0;12.0+PTX;13.0"},
            *([], ALL, "8.0;9.0a;8.0+PTX;12.0+PTX"),
        ),
        ({}, [], "compute_80", "8.0+PTX"),
        ({}, [], "compute_75 compute_80 compute_90", "8.0+PTX;9.0+PTX"),
    ],
)
def test_a_build_is_for_what_is_asked_or_present_or_for_all(environment, present, nvcc, asked):
    assert cards.asked_for(environment, present, nvcc) == asked
    cards.build_for(asked)


def test_an_nvcc_that_knows_none_of_our_gpus_is_refused():
    assert refused({}) == (
        f"nvcc knows no compute capability that the kernels are for: {cards.needed()}; install a "
        "newer CUDA toolkit, or set VLLM_QOQ_CUDA=0 for an installation without kernels"
    )


def refused(environment):
    with pytest.raises(ValueError) as error:
        cards.build_for(cards.asked_for(environment, [], "compute_75"))
    return cards.refusal(error.value, environment)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"TORCH_CUDA_ARCH_LIST": "Turing"}, "TORCH_CUDA_ARCH_LIST=Turing: no compute capability"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;x"}, "TORCH_CUDA_ARCH_LIST=8.0;x: 'x' is no"),
        ({"TORCH_CUDA_ARCH_LIST": "ampere"}, "TORCH_CUDA_ARCH_LIST=ampere: 'ampere' is no compute"),
        (
            {"VLLM_QOQ_CUDA_ARCHS": "Ada", "TORCH_CUDA_ARCH_LIST": "Turing"},
            "VLLM_QOQ_CUDA_ARCHS=Ada: 'Ada' is no compute capability",
        ),
    ],
)
def test_the_variable_at_fault_is_named_with_its_value(environment, said):
    message = refused(environment)
    assert message.startswith(said) and "VLLM_QOQ_CUDA=0 for" in message
    assert message.count("TORCH_CUDA_ARCH_LIST") == said.count("TORCH_CUDA_ARCH_LIST")
    assert "VLLM_QOQ_CUDA_ARCHS" in message or "correct it, or set VLLM" in message


@pytest.mark.parametrize(
    ("capability", "path"), [((8, 6), "portable"), ((9, 0), "hopper"), ((13, 0), "portable")]
)
def test_a_gpu_takes_the_path_of_its_family_and_a_later_one_the_portable_path(capability, path):
    assert cards.gemm_path(capability, cards.build_for("8.0;9.0;12.0+PTX").codes) == path


def test_the_table_has_no_gpu_twice():
    for one in cards.FAMILIES:
        assert [cards.family((one.major, minor)) for minor in one.minors] == [one] * len(one.minors)


def test_heads_without_room_in_shared_memory_are_named(monkeypatch):
    properties = SimpleNamespace(shared_memory_per_block_optin=99 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    for heads in ((128, 4, 16), (128, 8, 15), (64, 8, 16)):
        assert not list(kv_ops.lacking_shared_memory(*heads))
    (said,) = kv_ops.lacking_shared_memory(128, 8, 16)
    assert "on a GPU whose blocks have 101376" in said
    properties.shared_memory_per_block_optin = 163 << 10
    assert not list(kv_ops.lacking_shared_memory(128, 8, 16))
