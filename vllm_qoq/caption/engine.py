"""vLLM as the engine of a pipeline: chats of one image each, as many at once as it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm import LLM, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_qoq.caption.errors import CaptionError, Uncaptioned
from vllm_qoq.caption.messages import Request
from vllm_qoq.caption.records import Caption
from vllm_qoq.engine_log import cause
from vllm_qoq.errors import reason

if TYPE_CHECKING:
    from PIL.Image import Image

# What the user's --engine-args may change. Every image is new, so that caches would only take
# memory and the time of a digest.
_DEFAULTS: dict[str, Any] = {
    "limit_mm_per_prompt": {"image": 1, "video": 0, "audio": 0},
    "mm_processor_cache_gb": 0,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
    "max_num_seqs": 256,
}
_OF_MEMORY = (
    "end what else has the memory, or give gpu_memory_utilization, kv_cache_memory_bytes or "
    "max_model_len in --engine-args"
)
_OF_ANYTHING = "change --engine-args, or give another model"
_FINISHED = ("stop", "length")
_FIRST_PIXELS = 224


class Engine:
    """An engine that has captioned a grey image, so that it is known to work.

    llm  vLLM's

    Raises CaptionError where vLLM does not start, or takes no images.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        try:
            args = {**_DEFAULTS, **request.engine_args}
            self.llm = LLM(request.model, trust_remote_code=False, **args)
        except Exception as error:  # vLLM raises its own and pydantic's
            why = cause(error, request.log)
            remedy = _OF_MEMORY if "memory" in why.lower() else _OF_ANYTHING
            raise CaptionError(f"{request.model}: vLLM did not start: {why}; {remedy}") from error
        if not self.llm.llm_engine.model_config.is_multimodal_model:
            raise CaptionError(f"{request.model}: takes no images; give a model that does")
        most = self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        # Some wait in the engine, so that the next one is there when another ends.
        self.capacity = most + max(1, most // 4)
        self._tickets: dict[str, int] = {}
        self._try()

    def add(self, ticket: int, image: Image, seed: int) -> None:
        """Take an image; Uncaptioned where vLLM refuses it."""
        request = self._request
        content = [{"type": "image_pil", "image_pil": image}]
        content.append({"type": "text", "text": request.prompt})
        messages: list[Any] = [{"role": "user", "content": content}]
        if request.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": request.system_prompt})
        sampling = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=seed if request.temperature else None,
        )
        try:
            (name,) = self.llm.enqueue_chat(messages, sampling, use_tqdm=False)
        except (EngineDeadError, MemoryError):
            raise
        except Exception as error:  # of vLLM, of the model's processor, of its chat template
            raise Uncaptioned("refused", reason(error)) from None
        self._tickets[_number(name)] = ticket

    def step(self) -> list[tuple[int, Caption | Uncaptioned]]:
        """Run a step of the engine; the captions that it has finished."""
        return [
            (self._tickets.pop(_number(output.request_id)), _found(output))
            for output in self.llm.llm_engine.step()
            if output.finished
        ]

    def close(self) -> None:
        """End vLLM's processes, which it leaves to the end of this one, and that waits for them."""
        self.llm.llm_engine.engine_core.shutdown()

    def _try(self) -> None:
        from PIL import Image

        size = (_FIRST_PIXELS, _FIRST_PIXELS)
        try:
            self.add(0, Image.new("RGB", size, (127, 127, 127)), 0)
            while not (done := self.step()):
                pass
        except Uncaptioned as failure:
            why = failure.why
        else:
            found = done[0][1]
            if isinstance(found, Caption):
                return
            why = found.why
        raise CaptionError(f"{self._request.model}: cannot caption a grey image: {why}")


def _number(name: str) -> str:
    """The number of a request in its name, to which vLLM may append digits of its own."""
    return name.partition("-")[0]


def _found(output: Any) -> Caption | Uncaptioned:
    answer = output.outputs[0]
    if answer.finish_reason not in _FINISHED:
        return Uncaptioned("engine", f"vLLM ended it with {answer.finish_reason}")
    return Caption(
        caption=answer.text,
        prompt_tokens=len(output.prompt_token_ids or ()),
        tokens=len(answer.token_ids),
        finish=answer.finish_reason,
    )
