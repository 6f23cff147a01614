"""The routing table as a pure function."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_qoq.routing.table import LayerRoute, Phase, Routing, RoutingError, Step, parse_decode

SETS = ("w8a8", "w4a16", "w4a8")
TABLE = {
    "prefill": "w8a8",
    "decode": [
        {"max_batch": 16, "set": "w4a16"},
        {"max_batch": 64, "set": "w4a8"},
        {"set": "w8a8"},
    ],
    "layers": [
        {"match": "model.layers.[0-1].*", "decode": "w8a8"},
        {"match": "*.down_proj", "prefill": "w4a8"},
    ],
}


def decode(batch: int) -> Step:
    return Step(Phase.DECODE, batch)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [(1, "w4a16"), (16, "w4a16"), (17, "w4a8"), (64, "w4a8"), (65, "w8a8"), (10**6, "w8a8")],
)
def test_first_row_that_holds_the_batch_wins(batch, expected):
    assert Routing.parse(TABLE, SETS).route(["x"]).choose(decode(batch)) == expected


def test_prefill_ignores_the_batch():
    route = Routing.parse(TABLE, SETS).route(["x"])
    assert {route.choose(Step(Phase.PREFILL, n)) for n in (1, 16, 9999)} == {"w8a8"}


def test_first_layer_rule_that_matches_wins_and_leaves_the_other_phase():
    routing = Routing.parse(TABLE, SETS)
    early = routing.route(["model.layers.1.mlp.down_proj"])
    late = routing.route(["model.layers.2.mlp.down_proj"])
    assert (early.prefill, early.choose(decode(1))) == ("w8a8", "w8a8")
    assert (late.prefill, late.choose(decode(1))) == ("w4a8", "w4a16")


def test_rule_must_not_split_a_fused_layer():
    table = {
        "prefill": "w8a8",
        "decode": "w8a8",
        "layers": [{"match": "*.q_proj", "decode": "w4a8"}],
    }
    routing = Routing.parse(table, SETS)
    with pytest.raises(RoutingError, match=r"'\*\.q_proj'.*a\.q_proj.*a\.k_proj"):
        routing.route(["a.q_proj", "a.k_proj"], fused_name="a.qkv_proj")


def test_rule_may_name_a_fused_layer_or_all_its_parts():
    for glob in ("*.qkv_proj", "*.[qk]_proj"):
        table = {"prefill": "w8a8", "decode": "w8a8", "layers": [{"match": glob, "decode": "w4a8"}]}
        route = Routing.parse(table, SETS).route(["a.q_proj", "a.k_proj"], fused_name="a.qkv_proj")
        assert route.choose(decode(3)) == "w4a8"


def test_unmatched_names_the_dead_rules():
    assert Routing.parse(TABLE, SETS).unmatched(["model.layers.0.q"]) == ["*.down_proj"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"prefill": "w8a8"}, "routing.decode"),
        ({"prefill": "w8a8", "decode": []}, "empty"),
        ({"prefill": "w8a8", "decode": [{"max_batch": 4, "set": "w8a8"}]}, "above 4"),
        ({"prefill": "w8a8", "decode": [{"set": "w8a8"}, {"set": "w4a8"}]}, "never reached"),
        (
            {
                "prefill": "w8a8",
                "decode": [
                    {"max_batch": 4, "set": "w8a8"},
                    {"max_batch": 4, "set": "w4a8"},
                    {"set": "w8a8"},
                ],
            },
            r"must grow: \[4, 4\]",
        ),
        (
            {"prefill": "w8a8", "decode": [{"max_batch": 0, "set": "w8a8"}, {"set": "w8a8"}]},
            "max_batch",
        ),
        ({"prefill": "w9", "decode": "w8a8"}, "'w9'.*w8a8, w4a16, w4a8"),
        ({"prefill": "w8a8", "decode": "w8a8", "prefil": "w8a8"}, "routing.prefil"),
        ({"prefill": "w8a8", "decode": "w8a8", "layers": [{"match": "*"}]}, "neither"),
        ({"prefill": "w8a8", "decode": "w8a8", "layers": [{"match": "*", "decode": "w9"}]}, "'w9'"),
        ("w8a8", "routing"),
        *(
            ({"prefill": "w8a8", "decode": "w8a8", "load": load}, message)
            for load, message in (
                ({"enter": 8, "leave": 2}, "routing.load: .*neither"),
                ({"enter": 8, "leave": 8, "decode": "w4a8"}, "'leave' is 8, .*'enter', 8"),
                ({"enter": 8, "leave": -1, "decode": "w4a8"}, "routing.load.leave"),
                ({"enter": 0, "leave": 0, "decode": "w4a8"}, "routing.load.enter"),
                ({"enter": 8, "decode": "w4a8"}, "routing.load.leave"),
                ({"enter": 8, "leave": 2, "prefill": "w9"}, "routing.load.prefill .*'w9'"),
                ({"enter": 8, "leave": 2, "decode": "w9"}, "routing.load.decode .*'w9'"),
                ({"enter": 8, "leave": 2, "decode": []}, "empty"),
            )
        ),
    ],
)
def test_bad_tables_are_refused_with_the_reason(table, message):
    with pytest.raises(RoutingError, match=message) as error:
        Routing.parse(table, SETS)
    assert "; " in str(error.value)  # and what to do


LOAD = {"enter": 8, "leave": 2, "decode": [{"max_batch": 4, "set": "w4a8"}, {"set": "w4a16"}]}


@pytest.mark.parametrize("more", [{}, {"load": LOAD}, {"load": LOAD | {"prefill": "w4a8"}}])
def test_json_round_trip(more):
    routing = Routing.parse(TABLE | more, SETS)
    assert Routing.parse(routing.to_json(), SETS) == routing
    assert ("load" in routing.to_json()) == bool(more)


def busy_step(phase: Phase, batch: int) -> Step:
    return Step(phase, batch, is_busy=True)


def test_load_replaces_the_phases_that_it_names_while_busy():
    route = Routing.parse(TABLE | {"load": LOAD}, SETS).route(["x"])
    assert [route.choose(decode(batch)) for batch in (4, 5, 65)] == ["w4a16", "w4a16", "w8a8"]
    busy = [route.choose(busy_step(Phase.DECODE, batch)) for batch in (4, 5, 65)]
    assert busy == ["w4a8", "w4a16", "w4a16"]
    assert route.choose(busy_step(Phase.PREFILL, 1)) == "w8a8", "load does not name prefill"
    both = Routing.parse(TABLE | {"load": LOAD | {"prefill": "w4a8"}}, SETS).route(["x"])
    assert both.choose(busy_step(Phase.PREFILL, 1)) == "w4a8"


def test_a_layer_rule_stands_above_load_for_the_phase_that_it_names():
    table = TABLE | {"load": LOAD | {"prefill": "w4a16"}}
    early = Routing.parse(table, SETS).route(["model.layers.1.x"])
    assert early.choose(busy_step(Phase.DECODE, 1)) == "w8a8"
    assert early.choose(busy_step(Phase.PREFILL, 1)) == "w4a16"


def test_without_load_the_state_means_nothing():
    route = Routing.parse(TABLE, SETS).route(["x"])
    assert route.choose(busy_step(Phase.DECODE, 1)) == route.choose(decode(1)) == "w4a16"


def test_sets_that_only_load_names_are_reachable_and_named():
    table = {"prefill": "w8a8", "decode": "w8a8", "load": LOAD}
    routing = Routing.parse(table, SETS)
    assert routing.route(["x"]).reachable() == routing.sets() == {"w8a8", "w4a8", "w4a16"}
    assert routing.route(["x"]).reachable(4) == {"w8a8", "w4a8"}


def test_the_table_of_one_state_says_the_same_without_load():
    routing = Routing.parse(TABLE | {"load": LOAD}, SETS)
    route = routing.route(["x"])
    for is_busy in (False, True):
        alone = routing.in_state(is_busy)
        assert alone.load is None and alone.layers == routing.layers
        for step in (Step(phase, batch, is_busy) for phase in Phase for batch in (1, 4, 5, 99)):
            assert alone.route(["x"]).choose(step) == route.choose(step)


def test_renaming_and_forcing_know_load():
    routing = Routing.parse(TABLE | {"load": LOAD}, SETS)
    assert routing.rename(str.upper).load == routing.load
    assert Routing.forced("w8a8").load is None


def test_command_line_form():
    rows = parse_decode("16:w4a16,w8a8")
    assert [(row.max_batch, row.set_name) for row in rows] == [(16, "w4a16"), (None, "w8a8")]


@pytest.mark.parametrize(
    "text",
    [
        *("", "16:w8a8", "x:w8a8,w4a8", "w8a8,w4a8", "8:a,4:b,c", "a,", "16:,a"),
        *("0:a,b", "00:a,b", "-1:a,b", f"{'9' * 5000}:a,b", "9999999999:a,b", "\u0661:a,b"),
    ],
)
def test_bad_command_line_forms(text):
    with pytest.raises(RoutingError, match=r"--decode '.*'.*: .*; ") as error:
        parse_decode(text)
    assert len(str(error.value)) < 400


@given(
    bounds=st.lists(st.integers(1, 2000), unique=True, max_size=5).map(sorted),
    batch=st.integers(0, 4000),
    max_batch=st.integers(0, 4000),
)
def test_every_batch_has_the_answer_of_a_linear_search_and_it_is_reachable(
    bounds, batch, max_batch
):
    names = [f"s{i}" for i in range(len(bounds) + 1)]
    route = LayerRoute("p", tuple(bounds), tuple(names))
    by_search = next((n for b, n in zip(bounds, names, strict=False) if batch <= b), names[-1])
    assert route.choose(decode(batch)) == by_search
    if batch <= max_batch:
        assert by_search in route.reachable(max_batch)
    assert route.reachable() == {"p", *names}


@given(
    calm=st.lists(st.integers(1, 60), unique=True, max_size=4).map(sorted),
    busy=st.lists(st.integers(1, 60), unique=True, max_size=4).map(sorted),
    max_batch=st.integers(1, 70),
)
def test_pairs_are_those_of_every_step(calm, busy, max_batch):
    def route(name, bounds, busy=None):
        names = tuple(f"{name}{i}" for i in range(len(bounds) + 1))
        return LayerRoute(name, tuple(bounds), names, busy)

    both = route("c", calm, busy=route("b", busy))
    steps = [Step(phase, batch) for phase in Phase for batch in range(1, max_batch + 1)]
    assert both.pairs(max_batch) == {(step.phase, *both.pair(step)) for step in steps}
    alone = route("c", calm)
    assert all(one == other for _, one, other in alone.pairs(max_batch))


def test_sets_of_batches_that_cannot_occur_are_not_reachable():
    route = Routing.parse({"prefill": "w4a16", "decode": TABLE["decode"]}, SETS).route(["x"])
    assert route.reachable(16) == {"w4a16"}
    assert route.reachable(17) == {"w4a16", "w4a8"}


def test_forced_routing_knows_one_set():
    assert Routing.forced("w4a8").route(["x"]).reachable() == {"w4a8"}
