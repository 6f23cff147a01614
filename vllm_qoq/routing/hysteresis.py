"""The switch that says when an engine is busy, with two thresholds."""

from __future__ import annotations


class Hysteresis:
    """A switch that is busy from when `enter` requests wait until no more than `leave` do.

    Between the two the state stays as it is, so a queue that hovers around one of them does not
    make the switch flutter. It begins calm. Raises ValueError unless 0 <= leave < enter.
    """

    def __init__(self, enter: int, leave: int) -> None:
        if not 0 <= leave < enter:
            raise ValueError(f"0 <= leave < enter, not enter {enter} and leave {leave}")
        self.enter, self.leave = enter, leave
        self.is_busy = False

    def update(self, waiting: int) -> bool:
        """Say whether the engine is busy, now that `waiting` requests wait."""
        self.is_busy = waiting > self.leave if self.is_busy else waiting >= self.enter
        return self.is_busy
