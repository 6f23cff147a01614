"""What all errors that a user can mend have in common."""


class UserError(ValueError):
    """Something that was asked for cannot be done. The message says why, and what to do instead."""


class EngineError(RuntimeError):
    """A `UserError` that is raised while vLLM makes its configuration.

    pydantic makes that configuration, and wraps a ValueError into a page of its own. This one
    passes, so that its message is the last line that `vllm serve` and `LLM()` write.
    """
