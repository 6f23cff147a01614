"""Captions for the images of WebDataset shards, with vLLM: `vllm-qoq caption`.

Modules, in the order in which they import each other:

    errors    why a sample has no caption
    shards    the shards that are asked for, and what a list of them says
    tar       the samples of one shard, streamed from its tar file
    image     bytes to pixels, within limits
    records   lines of the write-ahead file, and the facts of a finished shard
    lock      a file for one process alone, and who has it
    journal   the write-ahead file of a shard, and the files that it becomes
    folder    the output folder: whose it is, and which job is in it
    bounded   a queue that is full by number or by bytes
    pipeline  reading, decoding, captioning and writing, each in threads of its own
    messages  what processes tell each other
    worker    the process of one engine
    cause     why vLLM did not start, from its log
    engine    vLLM as the engine of a pipeline
    sigterm   SIGTERM as Ctrl-C
    devices   which GPUs an engine gets
    job       what is asked, checked before work begins
    status    progress for a terminal or a log
    run       a job: its engines, their shards, the end
    report    the plan and the summary, as text and as JSON
"""

from __future__ import annotations

PROMPT = "Describe this image in detail."
"""What is asked about each image, unless something else is."""

MAX_TOKENS = 256
"""The longest caption, unless another length is asked for."""
