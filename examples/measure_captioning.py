"""How many images a second `vllm-qoq caption` does, ours beside vLLM's formats and transformers.

    python examples/measure_captioning.py qwen2.5-vl-7b -o OUT [--images 1024] [--gpus 1 2]

Nothing is downloaded: the images are made here, with as many bytes as photographs, and the model is
of a known shape with dummy weights, so that captions are of tokens without a meaning, and all of
--new-tokens tokens. The script runs every way of --ways for every size of images and number of GPUs
and writes OUT/captioning.json and OUT/captioning.md after each; OUT/runs has what each run said of
itself. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_qoq.bench.serving import formats
from vllm_qoq.bench.serving.online.tokenizer import FILES, write_tokenizer
from vllm_qoq.bench.serving.random_weights import RandomWeights
from vllm_qoq.caption import PROMPT
from vllm_qoq.cli import arguments
from vllm_qoq.environment import describe
from vllm_qoq.errors import UserError
from vllm_qoq.markdown import markdown_table

if TYPE_CHECKING:
    from vllm_qoq.caption.messages import Request
    from vllm_qoq.caption.pipeline import Captioner

HERE = Path(__file__).resolve().parent
PEER = "transformers"
WAYS = ("bf16", "fp8-kvfp8", "w8a8-kvfp8", "w4a8-kv4", PEER)
SIZES = (336, 1024)
ENGINE_ARGS = {"max_model_len": 4096}
QUALITY = 90
_SHARD_IMAGES = 64
_SETTINGS = (
    *("shape", "images", "new_tokens", "engine_args", "transformers_images", "transformers_batch"),
)

# The config.json of Qwen/Qwen2.5-VL-7B-Instruct, without tokens that begin or end a text.
_QWEN = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
    "vocab_size": 152064,
    **{"bos_token_id": None, "eos_token_id": None},  # so that captions are of one length
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "dtype": "bfloat16",
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_channels": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
_TINY = {
    **{"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 1100},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096},
    **{"vision_start_token_id": 1024, "vision_end_token_id": 1025},
    **{"image_token_id": 1026, "video_token_id": 1027},
}
_TINY_VISION = {
    **{"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2},
    **{"out_hidden_size": 256, "window_size": 56, "fullatt_block_indexes": [1]},
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-vl-7b": _QWEN,
    "tiny": {**_QWEN, **_TINY, "vision_config": {**_QWEN["vision_config"], **_TINY_VISION}},  # type: ignore[dict-item]
}
_TOKENS = {
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
}
_PAD = "<|video_pad|>"  # no video comes
_PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    **{"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2},
    **{"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True},
    "size": {"shortest_edge": 56 * 56, "longest_edge": 2048 * 28 * 28},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}"
)


def write_checkpoint(folder: Path, shape: str, how: formats.Format) -> Path:
    """Write all files of a checkpoint but its weights. No token ends a text."""
    config = how.config(SHAPES[shape])
    section = config.get("quantization_config", {})
    for one in (section, *section.get("sets", {}).values()):  # the tower stays in bf16
        if one.get("quant_method") == "compressed-tensors":
            one["ignore"].append(r"re:(.*\.)?visual\.")
        elif one.get("quant_method") == "qoq_linear":
            one["ignore"] = ["lm_head", "visual.*", "*.visual.*"]
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, config["vocab_size"])
    tokenizer, words = (json.loads((folder / name).read_text()) for name in FILES)
    vocabulary = tokenizer["model"]["vocab"]
    for token, key in _TOKENS.items():
        del vocabulary[f"t{config[key]}"]
        vocabulary[token] = config[key]
        added = {"id": config[key], "content": token, "special": True, "normalized": False}
        added |= {"single_word": False, "lstrip": False, "rstrip": False}
        tokenizer["added_tokens"].append(added)
    words["pad_token"] = _PAD
    files = dict(zip(FILES, (tokenizer, words), strict=True))
    files |= {"config.json": config, "preprocessor_config.json": _PREPROCESSOR}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    return folder


def photographs(count: int, size: int) -> Iterator[bytes]:
    """Make JPEGs that look to a codec like photographs: clouds of all scales, edges, grain.

    The same count and size make the same images.
    """
    import io

    import numpy as np
    from PIL import Image, ImageDraw

    noise, edge = np.random.default_rng(size), 2 * size
    # Amplitudes fall with the frequency, a little faster than those of sharp photographs do.
    frequency = np.hypot(np.fft.fftfreq(edge)[:, None], np.fft.rfftfreq(edge)[None])
    frequency = frequency**1.25
    frequency[0, 0] = np.inf
    clouds = []
    for _ in range(6):
        waves = noise.normal(size=(2, *frequency.shape)) / frequency
        cloud = np.fft.irfft2(waves[0] + 1j * waves[1], s=(edge, edge))
        clouds.append((cloud / cloud.std()).astype(np.float32))

    def photograph(number: int) -> bytes:
        random = np.random.default_rng([size, number])
        planes = []
        for chosen, strength in zip(random.permutation(6)[:3], (50, 15, 15), strict=True):
            y, x = random.integers(0, size, 2)
            planes.append(128 + strength * clouds[chosen][y : y + size, x : x + size])
        pixels = np.stack(planes, axis=2)
        pixels[..., 0] += random.normal(scale=1.5, size=(size, size))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "YCbCr").convert("RGB")
        draw = ImageDraw.Draw(image, "RGBA")
        for _ in range(20):
            corners = [tuple(corner) for corner in random.integers(0, size, (4, 2)).tolist()]
            draw.polygon(corners, fill=(*random.integers(0, 256, 3).tolist(), 90))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY)
        return file.getvalue()

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(photograph, range(count))


def write_shards(folder: Path, count: int, size: int, gpus: int) -> Path:
    """Write `count` images into shards, some for each GPU; a folder that is there is complete."""
    import webdataset

    each = max(1, min(_SHARD_IMAGES, count // (4 * gpus)))
    unfinished = folder.with_name(f"{folder.name}.partial")
    if not folder.exists():
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        pattern = str(unfinished / "%05d.tar")
        with webdataset.ShardWriter(pattern, maxcount=each, encoder=False, verbose=0) as writer:
            for number, content in enumerate(photographs(count, size)):
                writer.write({"__key__": f"{number:08}", "jpg": content})
        unfinished.rename(folder)
    return folder


def random_engine(request: Request) -> Captioner:
    """Start vLLM with dummy weights, those of its own formats random as in `bench serving`."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from vllm_qoq.caption.engine import Engine

    engine = Engine(request)
    engine.llm.collective_rpc(RandomWeights.fill_random_weights.__name__)
    return engine


def with_vllm(args: argparse.Namespace, way: str, shards: Path, gpus: int) -> dict[str, Any]:
    """Run what `vllm-qoq caption` does, with an engine for each GPU."""
    from vllm_qoq.caption import report
    from vllm_qoq.caption.job import Job, check
    from vllm_qoq.caption.run import caption

    how, out = formats.parse(way), args.output / "captions" / f"{shards.name}-{gpus}-{way}"
    out.parent.mkdir(exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)  # of a run that was stopped: a part says nothing
    engine_args = {
        **{"load_format": "dummy", **how.engine_args()},
        "worker_extension_cls": f"{RandomWeights.__module__}.{RandomWeights.__name__}",
        **ENGINE_ARGS,
        **args.engine_args,
    }
    job = Job(
        shards=str(shards),
        out=out,
        model=write_checkpoint(args.output / "checkpoints" / way, args.shape, how),
        max_tokens=args.new_tokens,
        engine_args=engine_args,
        engines=gpus,
        quiet=True,
    )
    said = report.summary(caption(check(job), random_engine))
    if said["tokens"] != args.images * args.new_tokens:
        raise UserError(
            f"{said['captions']} captions of {said['tokens']} tokens in all, where "
            f"{args.images} of {args.new_tokens} each were asked for: {said['failures']}"
        )
    shutil.rmtree(out)
    run = said["run"]
    return {
        **{name: run[name] for name in ("images", "images_per_second", "tokens_per_second")},
        **{name: _mean(run["engines"], name) for name in ("busy", "full", "start_seconds")},
        "prompt_tokens": said["prompt_tokens"] / said["captions"],
        "said": said,
    }


def with_transformers(args: argparse.Namespace, shards: Path, gpus: int) -> dict[str, Any]:
    """Run `caption_transformers.py`, a process for each GPU with some of the shards."""
    from vllm_qoq.caption.devices import groups

    model = write_checkpoint(args.output / "checkpoints" / PEER, args.shape, formats.parse("bf16"))
    line = [sys.executable, str(HERE / "caption_transformers.py"), str(model)]
    options = ["--new-tokens", str(args.new_tokens), "--prompt", PROMPT]
    options += ["--images", str(max(1, args.transformers_images // gpus))]
    if args.transformers_batch is not None:
        options += ["--batch", str(args.transformers_batch)]
    names = sorted(map(str, shards.glob("*.tar")))
    processes = [
        subprocess.Popen(
            [*line, *names[index::gpus], *options],
            env={**os.environ, **({} if where is None else {"CUDA_VISIBLE_DEVICES": where})},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index, where in enumerate(groups(gpus, 1))
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise UserError(f"{PEER}: a process failed; its error is above")
    said = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {
        "images": sum(one["images"] for one in said),
        "images_per_second": sum(one["images"] / one["seconds"] for one in said),
        "tokens_per_second": sum(one["tokens"] / one["seconds"] for one in said),
        "batches": [one["batch"] for one in said],
        "said": said,
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Draw the table; a ratio is to the fastest of vLLM's formats with the same images and GPUs."""
    rows = []
    for run in runs:
        best = max(
            (
                other["images_per_second"]
                for other in runs
                if (other["size"], other["gpus"]) == (run["size"], run["gpus"])
                and other["way"] != PEER
                and not formats.parse(other["way"]).is_ours
            ),
            default=None,
        )
        way = run["way"]
        if way == PEER:
            way += f", batches of {' and '.join(map(str, sorted({*run['batches']})))}"
        rows.append(
            [
                way,
                *(str(run["size"]), str(run["gpus"]), f"{run['images_per_second']:.2f}"),
                f"{run['tokens_per_second']:.0f}",
                *(f"{run[key]:.0%}" if key in run else "" for key in ("busy", "full")),
                "" if best is None else f"{run['images_per_second'] / best:.2f}",
                f"{run['start_seconds']:.0f}" if "start_seconds" in run else "",
            ]
        )
    head = ["way", "pixels", "GPUs", "images/s", "tokens/s", "busy", "full", "ratio", "start, s"]
    return markdown_table(head, rows)


def save(args: argparse.Namespace) -> None:
    """Write the document and the table of what has been measured so far."""
    runs = [json.loads(path.read_text()) for path in (args.output / "runs").glob("*.json")]
    if not runs:
        return
    known = [*WAYS, *sorted({run["way"] for run in runs} - {*WAYS})]
    runs.sort(key=lambda run: (run["size"], run["gpus"], known.index(run["way"])))
    document = {
        "command": shlex.join(["python", "examples/measure_captioning.py", *sys.argv[1:]]),
        "settings": settings(args),
        "runs": [{key: run[key] for key in run if key != "said"} for run in runs],
    }
    write(args.output / "captioning.json", json.dumps(document, indent=1) + "\n")
    write(args.output / "captioning.md", table(runs))


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Name what all runs of a table have to have in common."""
    return {name: getattr(args, name) for name in _SETTINGS}


def write(path: Path, text: str) -> None:
    """Write a file whole."""
    unfinished = path.with_name(f"{path.name}.partial")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _mean(engines: Sequence[dict[str, Any]], key: str) -> float:
    return float(sum(one[key] for one in engines) / len(engines))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    positive = arguments.positive
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    parser.add_argument("--images", type=positive, default=1024, help="a run (default: 1024)")
    parser.add_argument("--sizes", type=positive, nargs="+", default=list(SIZES), metavar="PIXELS",
                        help="width and height of the images (default: 336 1024)")  # fmt: skip
    parser.add_argument("--gpus", type=positive, nargs="+", default=[1], metavar="N",
                        help="numbers of GPUs, an engine each (default: 1)")  # fmt: skip
    parser.add_argument("--ways", nargs="+", default=list(WAYS), metavar="WAY",
                        help="formats of `bench serving`, and transformers "
                        f"(default: {' '.join(WAYS)})")  # fmt: skip
    parser.add_argument("--new-tokens", type=positive, default=300, help="(default: 300)")
    parser.add_argument("--engine-args", type=arguments.json_object, default={}, metavar="JSON",
                        help=f"of all engines (default: {json.dumps(ENGINE_ARGS)})")  # fmt: skip
    parser.add_argument("--transformers-images", type=positive, default=256, metavar="N",
                        help="of a run with transformers (default: 256)")  # fmt: skip
    parser.add_argument("--transformers-batch", type=positive, metavar="N",
                        help="default: the largest that fits, up to 256")  # fmt: skip
    args = parser.parse_args(words)
    for way in args.ways:
        if way != PEER:
            try:
                formats.parse(way)
            except UserError as error:
                parser.error(f"--ways: {error}")
    return args


def main() -> None:
    """Measure what is not measured yet, going on after what fails."""
    args = parse()
    path = args.output / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings(args):
        raise SystemExit(
            f"error: -o {args.output}: holds runs with other options, {path}; name a new folder or "
            "give the same options"
        )
    (args.output / "runs").mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(settings(args), indent=1) + "\n")
    failed = []
    for size in args.sizes:
        shards = write_shards(args.output / "shards" / str(size), args.images, size, max(args.gpus))
        for gpus in args.gpus:
            for way in args.ways:
                name = f"{size}-{gpus}-{way}"
                file = args.output / "runs" / f"{name}.json"
                if file.exists():
                    continue
                begin = time.monotonic()
                try:
                    found = (
                        with_transformers(args, shards, gpus)
                        if way == PEER
                        else with_vllm(args, way, shards, gpus)
                    )
                except (UserError, OSError) as error:
                    print(f"{name}: failed: {error}", file=sys.stderr, flush=True)
                    failed.append(name)
                    continue
                run = {"size": size, "gpus": gpus, "way": way, **found, "environment": describe()}
                run["environment"]["transformers"] = version("transformers")
                write(file, json.dumps(run, indent=1) + "\n")
                save(args)
                seconds = f"{time.monotonic() - begin:.0f} s"
                print(f"{name}: measured in {seconds}", file=sys.stderr, flush=True)
    save(args)
    if failed:
        raise SystemExit(f"error: missing in the table: {', '.join(failed)}")
    print((args.output / "captioning.md").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
