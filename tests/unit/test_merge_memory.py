"""A merge holds neither of its sets in memory.

The kernel enforces it: RLIMIT_DATA bounds what a process may allocate or map for
itself, and mapping a shard counts as much as reading it. A loader that holds a set
fails under the same limit, so the limit is a real one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, LAYERS = 2048, 4096, 6
ALLOWED_MB = 160

LIMITED = f"""
import resource, sys
import safetensors.torch, torch
import merge_tools.job
torch.ones(8, 8) @ torch.ones(8, 8)  # start what torch starts late

with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) for line in status if line.startswith("VmData")) << 10
limit = used + ({ALLOWED_MB} << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
"""
MERGE = "from merge_tools.__main__ import main\nsys.exit(main())"
HOLD = """
from pathlib import Path
held = {}
for shard in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    held |= safetensors.torch.load_file(shard)
"""


@pytest.fixture
def sets(tmp_path):
    """Two W8A8 folders of 240 MB, mostly tensors of 8 MB; the second is links to the first."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        **{"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "dtype": "bfloat16"},
        **{"num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": True},
        **{"vocab_size": 512, "intermediate_size": INTERMEDIATE},
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}}},
        },
    }
    weight_map = {}
    for file, tensors in shards():
        save_file(tensors, first / file)
        weight_map |= dict.fromkeys(tensors, file)
    (first / "config.json").write_text(json.dumps(config))
    (first / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for item in first.iterdir():
        os.link(item, second / item.name)
    yield {"first": first, "second": second}
    for item in tmp_path.rglob("*.safetensors"):
        item.unlink()


def shards() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """File name and tensors: two shards per decoder layer and one for the rest."""
    norm = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        tensors = {f"{layer}.input_layernorm.weight": norm}
        for name in "qkvo":
            tensors |= linear(f"{layer}.self_attn.{name}_proj", HIDDEN, HIDDEN)
        yield f"attention-{number}.safetensors", tensors
        tensors = {f"{layer}.post_attention_layernorm.weight": norm}
        for name in ("gate", "up"):
            tensors |= linear(f"{layer}.mlp.{name}_proj", INTERMEDIATE, HIDDEN)
        tensors |= linear(f"{layer}.mlp.down_proj", HIDDEN, INTERMEDIATE)
        yield f"mlp-{number}.safetensors", tensors
    embedding = torch.ones(512, HIDDEN, dtype=torch.bfloat16)
    yield (
        "rest.safetensors",
        {"model.norm.weight": norm, "model.embed_tokens.weight": embedding},
    )


def linear(layer: str, n: int, k: int) -> dict[str, torch.Tensor]:
    # Any codes will do, but rows of zeros would have no direction to compare.
    codes = torch.arange(n * k, dtype=torch.int32).remainder_(127).to(torch.int8).view(n, k)
    return {f"{layer}.weight": codes, f"{layer}.weight_scale": torch.full((n, 1), 0.01)}


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED + code, *map(str, arguments)]
    # Freed tensors go back to the kernel at once, so that the limit meets what is held
    # and not what glibc keeps for later.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's RLIMIT_DATA")
def test_a_merge_fits_where_one_set_does_not(sets, tmp_path):
    size = sum(item.stat().st_size for item in sets["first"].glob("*.safetensors"))
    assert size > 1.4 * (ALLOWED_MB << 20)
    out = tmp_path / "out"
    done = run(MERGE, "merge", *(f"{k}={v}" for k, v in sets.items()), "-o", out, "-q", "--debug")
    assert done.returncode == 0, done.stderr
    assert sum(item.stat().st_size for item in out.glob("*.safetensors")) > 1.9 * size

    held = run(HOLD, sets["first"])
    assert held.returncode != 0
    assert "memory" in held.stderr.lower(), held.stderr
