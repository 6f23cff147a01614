"""The switch with two thresholds."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_qoq.routing.hysteresis import Hysteresis

BOUNDS = st.tuples(st.integers(0, 50), st.integers(1, 50)).map(lambda p: (p[0] + p[1], p[0]))
QUEUES = st.lists(st.integers(0, 120), max_size=60)


def states(bounds, queue):
    switch = Hysteresis(*bounds)
    return [switch.update(waiting) for waiting in queue]


@given(bounds=BOUNDS, queue=QUEUES)
def test_a_switch_needs_its_threshold_and_the_thresholds_need_a_switch(bounds, queue):
    enter, leave = bounds
    for (before, after), waiting in zip(
        itertools.pairwise([False, *states(bounds, queue)]), queue, strict=True
    ):
        if waiting >= enter:
            assert after
        elif waiting <= leave:
            assert not after
        else:
            assert after == before


@given(bounds=BOUNDS, data=st.data())
def test_between_the_thresholds_nothing_ever_flips(bounds, data):
    enter, leave = bounds
    begin = data.draw(st.integers(0, 120))
    between = st.integers(leave + 1, enter - 1) if enter - leave > 1 else st.nothing()
    queue = data.draw(st.lists(between, max_size=30)) if enter - leave > 1 else []
    assert len(set(states(bounds, [begin, *queue]))) == 1


@given(bounds=BOUNDS, queue=QUEUES, data=st.data())
def test_a_longer_queue_never_makes_it_calmer(bounds, queue, data):
    more = [waiting + data.draw(st.integers(0, 20)) for waiting in queue]
    pairs = zip(states(bounds, queue), states(bounds, more), strict=True)
    assert all(longer >= shorter for shorter, longer in pairs)


@pytest.mark.parametrize("bounds", [(0, 0), (2, 2), (2, 3), (2, -1)])
def test_thresholds_that_cannot_be(bounds):
    with pytest.raises(ValueError, match="leave < enter"):
        Hysteresis(*bounds)
