"""An engine that is measured: `python -m vllm_qoq.bench.serving.engine REQUEST RECORDS`.

REQUEST is a JSON file (`records.Request`), RECORDS the file that gets a line for each result.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from vllm_qoq.bench.serving.cases import Lengths, fitting
from vllm_qoq.bench.serving.random_weights import RandomWeights
from vllm_qoq.bench.serving.records import Facts, Line, Measured, Request, read

_WARM_UP = Lengths(1024, 4)
_WARM_UP_BATCH = 8


def main(request_file: Path, records: Path) -> None:
    """Start the engine and measure each case that `records` does not have yet."""
    started = time.perf_counter()
    request = Request.model_validate_json(request_file.read_text(encoding="utf-8"))
    lengths = [Lengths(*pair) for pair in request.lengths]
    engine = _Engine(request, max(one.tokens for one in lengths))
    longest = max(one.prompt for one in lengths)
    engine.measure(Lengths(min(longest, _WARM_UP.prompt), _WARM_UP.new), _WARM_UP_BATCH)
    facts = engine.facts(time.perf_counter() - started)
    _, done = read(records)
    cases = {one.case for one in done}
    with records.open("a", encoding="utf-8") as file:

        def write(line: Line) -> None:
            file.write(line.model_dump_json() + "\n")
            file.flush()

        write(Line(facts=facts))
        for one in lengths:
            for batch in fitting(
                request.batches, request.sizes, one, facts.pool_blocks, facts.block_tokens
            ):
                if (one, batch) not in cases:
                    runs = [engine.measure(one, batch) for _ in range(request.repeats)]
                    write(Line(measured=_median(runs)))


class _Engine:
    """vLLM's engine for prompts of random tokens, all of which are new to its cache."""

    def __init__(self, request: Request, tokens: int) -> None:
        most = request.sizes[-1]
        self._llm = LLM(
            request.model,
            skip_tokenizer_init=True,
            max_model_len=tokens,
            max_num_seqs=most,
            enable_prefix_caching=False,
            trust_remote_code=False,
            disable_log_stats=True,
            compilation_config={"cudagraph_capture_sizes": list(request.sizes)},
            worker_extension_cls=f"{RandomWeights.__module__}.{RandomWeights.__name__}",
            **request.engine_args,
        )
        if request.engine_args.get("load_format") == "dummy":
            self._llm.collective_rpc(RandomWeights.fill_random_weights.__name__)
        self._engine = self._llm.llm_engine
        self._random = random.Random(0)
        self._vocabulary = request.vocabulary
        self._names = map(str, itertools.count())

    def facts(self, start_seconds: float) -> Facts:
        config = self._engine.vllm_config.cache_config
        # vLLM keeps one block for itself.
        return Facts(
            pool_blocks=config.num_gpu_blocks - 1,
            block_tokens=config.block_size,
            start_seconds=start_seconds,
        )

    def measure(self, lengths: Lengths, batch: int) -> Measured:
        """Run `batch` requests that arrive together, to the end.

        Of the last one every token is seen as it comes: its first says when all prompts have been
        read, the others how long steps are until the first request ends. The other requests are
        seen when they end, so that the front end does not slow the engine down.
        """
        prompts = [
            [self._random.randrange(self._vocabulary) for _ in range(lengths.prompt)]
            for _ in range(batch)
        ]
        names = list(itertools.islice(self._names, batch))
        started = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            kind = RequestOutputKind.DELTA if name == names[-1] else RequestOutputKind.FINAL_ONLY
            self._engine.add_request(
                name, {"prompt_token_ids": prompt}, _sampling(lengths.new, kind)
            )
        seen: list[tuple[float, int]] = []
        has_full_batch = True
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter()
            watched = next((one for one in outputs if one.request_id == names[-1]), None)
            if watched is not None and (has_full_batch or not seen):
                seen.append((now, len(watched.outputs[0].token_ids)))
            has_full_batch = has_full_batch and not any(one.finished for one in outputs)
        (first, _), *others = seen
        tokens = sum(count for _, count in others)
        return Measured(
            prompt=lengths.prompt,
            new=lengths.new,
            batch=batch,
            seconds=time.perf_counter() - started,
            prompts_seconds=first - started,
            step_seconds=(others[-1][0] - first) / tokens if tokens else None,
        )


def _sampling(new: int, kind: RequestOutputKind) -> SamplingParams:
    return SamplingParams(
        max_tokens=new, temperature=0, ignore_eos=True, detokenize=False, output_kind=kind
    )


def _median(runs: list[Measured]) -> Measured:
    steps = [run.step_seconds for run in runs if run.step_seconds is not None]
    return runs[0].model_copy(
        update={
            "seconds": statistics.median(run.seconds for run in runs),
            "prompts_seconds": statistics.median(run.prompts_seconds for run in runs),
            "step_seconds": statistics.median(steps) if steps else None,
        }
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
