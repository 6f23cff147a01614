"""Random damage, with a fixed seed: whatever it is, a model is taken or refused in one line."""

import json
import random
import shutil
import struct

import pytest
from conftest import DATA

from vllm_qoq.checkpoint.folder import Checkpoint
from vllm_qoq.errors import UserError
from vllm_qoq.models.linears import linear_layers
from vllm_qoq.quantizer import load
from vllm_qoq.quantizer.inputs import check_inputs
from vllm_qoq.quantizer.options import QuantizeOptions
from vllm_qoq.quantizer.plan import Job
from vllm_qoq.routing.table import Routing, parse_decode

CONFIG = json.loads((DATA / "tiny-llama" / "config.json").read_text())
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 64, 2**31, 10**40, -(10**40), 0.5, 1e308, float("nan")),
    *(float("inf"), "", "x", "256", "silu", "\ud800", "\x1b[31m", "x" * 99999, [], [1], ["x"], {}),
    *({"a": 1}, [[[[]]]], {"rope_type": "yarn"}, {"rope_type": "linear", "factor": "x"}, ["q"] * 9),
)
KEYS = (
    *(*CONFIG, "quantization_config", "rope_theta", "rope_scaling", "sliding_window"),
    *("layer_types", "torch_dtype", "auto_map", "text_config", "use_sliding_window", "pad_token"),
    *(
        "max_window_layers",
        "transformers_weights",
        "id2label",
        "_attn_implementation",
        "is_decoder",
    ),
)


@pytest.fixture
def job(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(DATA / "tiny-llama", model)
    text, out = DATA / "calibration.txt", tmp_path / "out"
    return Job(model=model, out=out, text=text, work_dir=tmp_path / "work", quiet=True)


def taken(check):
    """Whether `check` takes what it is given; anything but a refusal in one line is a failure."""
    try:
        check()
    except UserError as error:
        assert str(error).isprintable() and 10 < len(str(error)) < 1000
        return False
    return True


def test_config_json(job):
    chance = random.Random(0)
    count = 0

    def check():
        inputs = check_inputs(job)
        load.check_model(inputs.checkpoint)

    for _ in range(400):
        config = dict(CONFIG)
        if chance.random() < 0.3:
            kind = chance.choice(["Mistral", "Qwen2", "Qwen3"])
            config |= {"model_type": kind.lower(), "architectures": [f"{kind}ForCausalLM"]}
        for key in chance.sample(KEYS, chance.choice([1, 1, 2, 3])):
            config[key] = chance.choice(VALUES)
            if chance.random() < 0.2:
                del config[key]
        (job.model / "config.json").write_text(json.dumps(config))
        count += taken(check)
        taken(lambda config=config: linear_layers(config, "imported"))
    assert 20 < count < 200  # neither is everything taken nor everything refused


def test_headers(job):
    chance = random.Random(0)
    file = job.model / "model.safetensors"
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    count = 0
    for _ in range(150):
        header = json.loads(content[8 : 8 + size])
        name = chance.choice([name for name in header if name != "__metadata__"])
        how = chance.randrange(5)
        if how == 0:
            del header[name]
        elif how == 1:
            header[name]["shape"] = chance.choice([[], [0], [2**62, 4], [-1], [256, 256], "x"])
        elif how == 2:
            header[name]["dtype"] = chance.choice(["F64", "I8", "F16", "F4", "F8_E4M3", 5, None])
        elif how == 3:
            header[chance.choice(["", "x" * 9999, "\x1b", "a.b", "lm_head"])] = header.pop(name)
        raw = bytearray(json.dumps(header).encode())
        if how == 4:
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        length = len(raw) if chance.random() < 0.9 else chance.choice([0, 2**63, len(raw) - 1])
        file.write_bytes(struct.pack("<Q", length) + raw + content[8 + size :])
        count += taken(lambda: check_inputs(job))
    assert count < 60


def test_tokenizer_files(job):
    chance = random.Random(0)
    checkpoint = Checkpoint.open(job.model)
    for _ in range(60):
        name = chance.choice(["tokenizer.json", "tokenizer_config.json"])
        content = bytearray((DATA / "tiny-llama" / name).read_bytes())
        for _ in range(chance.choice([1, 1, 9])):
            content[chance.randrange(len(content))] = chance.randrange(256)
        if chance.random() < 0.2:
            content = content[: chance.randrange(len(content))]
        (job.model / name).write_bytes(content)
        taken(lambda: load.load_tokenizer(checkpoint))
        shutil.copy(DATA / "tiny-llama" / name, job.model / name)


def test_tokenizer_config(job):
    chance = random.Random(0)
    checkpoint = Checkpoint.open(job.model)
    file = job.model / "tokenizer_config.json"
    known = json.loads(file.read_text())
    keys = (*known, "auto_map", "added_tokens_decoder", "extra_special_tokens", "chat_template")
    for _ in range(60):
        file.write_text(json.dumps(known | {chance.choice(keys): chance.choice(VALUES)}))
        taken(lambda: load.load_tokenizer(checkpoint))


def test_recipes_routing_and_decode_tables(tmp_path):
    chance = random.Random(0)
    recipe = tmp_path / "recipe.json"
    for _ in range(200):
        key = chance.choice([*QuantizeOptions.model_fields, "x", "\x1b", "y" * 9999])
        recipe.write_text(json.dumps({key: chance.choice(VALUES)}))
        taken(lambda: QuantizeOptions.read(recipe, {}))
        table = {"prefill": "a", "decode": "b", "layers": [{"match": "*", "decode": "a"}]}
        table["load"] = {"enter": 2, "leave": 1, "prefill": "a"}
        where = chance.choice([table, table["layers"][0], table["load"]])
        where[chance.choice([*where, key])] = chance.choice(VALUES)
        taken(lambda table=table: Routing.parse(table, ["a", "b"]))
        text = "".join(chance.choice("0123456789:,ab -\x1b²") for _ in range(chance.randrange(12)))
        taken(lambda text=text: parse_decode(text))
