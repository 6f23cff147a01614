"""A queue between threads that is full by number or by weight, and that can be closed."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """The queue is closed, and for a reader also empty."""


class Bounded(Generic[T]):
    """A queue of at most `most` items that weigh at most `heaviest`; one item always fits."""

    def __init__(self, most: int, heaviest: int) -> None:
        self._most, self._heaviest = most, heaviest
        self._items: deque[tuple[T, int]] = deque()
        self._weight = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def put(self, item: T, weight: int = 0) -> None:
        """Add an item, once there is room; Closed where nobody will take it."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._has_room(weight))
            if self._is_closed:
                raise Closed
            self._items.append((item, weight))
            self._weight += weight
            self._changed.notify_all()

    def get(self, seconds: float | None = None) -> T | None:
        """Take the oldest item; None where none comes within `seconds`.

        Raises Closed once the queue is closed and all items have been taken.
        """
        ends = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            while not self._items:
                if self._is_closed:
                    raise Closed
                left = None if ends is None else ends - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(left)
            item, weight = self._items.popleft()
            self._weight -= weight
            self._changed.notify_all()
            return item

    def close(self, drop: bool = False) -> None:
        """Let nothing more in; `drop` throws away what is there."""
        with self._changed:
            self._is_closed = True
            if drop:
                self._items.clear()
                self._weight = 0
            self._changed.notify_all()

    def _has_room(self, weight: int) -> bool:
        if not self._items:
            return True
        return len(self._items) < self._most and self._weight + weight <= self._heaviest
