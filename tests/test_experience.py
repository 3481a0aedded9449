"""What a dispatcher has learnt, as one answer: which times count, of which machine, and what a broken disk changes."""

import logging
import threading

import pytest
import torch
import torch.nn.functional as F

from heedful import AttentionDispatcher, AttentionStrategy, AttentionStrategyFactory, Limits, Policy
from heedful import experience as module
from heedful.knowledge import MEASURED, NOTHING, SHIPPED
from heedful.problem_class import class_of
from heedful.records import APART, Record, Window
from heedful.timings import shipped_for, table

CPU = torch.device("cpu")
QUERY = torch.randn(1, 4, 128, 64, generator=torch.Generator().manual_seed(0))
TABLE = "preference table for cpu"


class Plain(AttentionStrategy):
    limits = Limits(masks=frozenset({"causal"}), scale=True)

    def compute_attention(self, query, key, value, **kwargs):
        return F.scaled_dot_product_attention(query, key, value, **kwargs)


def fresh(names=("first", "second"), **policy):
    """A dispatcher whose table asks these strategies, alike but for their names, in this order."""
    factory = AttentionStrategyFactory(packages=(), plugins=False)
    for name in names:
        factory.register_strategy(name, type(name, (Plain,), {}))
    return AttentionDispatcher(factory, policy=Policy({"*": names}, **{"tune": "ahead", **policy}))


def windows(run="a run", **seconds):
    """Two that agree."""
    return [Window(ended=1e9 + 2 * APART * place, run=f"{run} {place}", seconds=seconds, turns=5) for place in range(2)]


def explained(dispatcher, query=QUERY):
    plan = dispatcher.explain(query, query, query)
    return plan.backend, plan.rung


def measured(dispatcher, query=QUERY, **seconds):
    problem = dispatcher.explain(query, query, query).problem
    for window in windows(**seconds):
        dispatcher.experience.add_window(problem, CPU, window)
    return problem


@pytest.fixture
def ship(monkeypatch):
    """Have a table of times be shipped for this machine."""

    def shipped(query=QUERY, **seconds):
        key = class_of(fresh().explain(query, query, query).problem)
        record = Record(tuple(windows("theirs", **seconds)))
        monkeypatch.setattr(module, "shipped_for", lambda _: {key: record})

    return shipped


# Which times count


def test_a_shipped_table_is_used_and_said(ship):
    ship(first=2e-3, second=1e-3)
    dispatcher = fresh()
    assert explained(dispatcher) == ("second", SHIPPED) == ("second", "shipped timing table")
    plan = dispatcher.explain(QUERY, QUERY, QUERY)
    assert plan.won == "2 times as fast as first"
    assert "1 ms a call" in str(plan)


def test_what_was_measured_here_goes_before_what_is_shipped(ship):
    ship(first=2e-3, second=1e-3)
    dispatcher = fresh()
    measured(dispatcher, first=1e-3, second=3e-3)
    assert explained(dispatcher) == ("first", MEASURED)
    assert dispatcher.explain(QUERY, QUERY, QUERY).known.seconds == {"first": 1e-3, "second": 3e-3}


def test_a_single_window_does_not_displace_what_is_shipped(ship):
    ship(first=2e-3, second=1e-3)
    dispatcher = fresh()
    problem = dispatcher.explain(QUERY, QUERY, QUERY).problem
    dispatcher.experience.add_window(problem, CPU, windows(first=1e-3, second=3e-3)[0])
    assert explained(dispatcher) == ("second", SHIPPED)


def test_times_are_those_of_the_whole_class_and_of_no_other():
    dispatcher = fresh()
    measured(dispatcher, first=2e-3, second=1e-3)
    assert explained(dispatcher, QUERY[:, :, :120]) == ("second", MEASURED)
    assert explained(dispatcher, QUERY[:, :, :64]) == ("first", TABLE)
    assert explained(dispatcher, QUERY.double()) == ("first", TABLE)


def test_off_ignores_what_was_measured_and_what_is_shipped(ship, tmp_path):
    ship(first=2e-3, second=1e-3)
    measured(fresh(cache=tmp_path), first=2e-3, second=1e-3)
    assert explained(fresh(cache=tmp_path)) == ("second", MEASURED)
    for policy in ({"guard": "off"}, {"guard": "replace"}):
        off = fresh(cache=tmp_path, tune="off", **policy)
        assert explained(off) == ("first", TABLE)
        assert off.explain(QUERY, QUERY, QUERY).known.seconds == {}


def test_nothing_is_known_while_compiling_or_of_another_machine(ship):
    ship(first=2e-3, second=1e-3)
    dispatcher = fresh()
    problem = measured(dispatcher, first=2e-3, second=1e-3)
    assert dispatcher.experience.known(problem.replace(compiling=True), CPU) is NOTHING


def test_a_table_that_was_exported_is_one_for_machines_like_this(tmp_path):
    dispatcher = fresh()
    problem = measured(dispatcher, first=2e-3, second=1e-3)
    store = dispatcher.experience.store(CPU)
    (tmp_path / "cpu.json").write_bytes(table(store.fingerprint, store.records()))
    found = shipped_for(store.fingerprint, tmp_path)
    assert found[class_of(problem)].winner() == "second"


# Faults


def test_a_fault_holds_for_its_class_here_and_later(tmp_path):
    dispatcher = fresh(cache=tmp_path)
    problem = measured(dispatcher, first=1e-3, second=2e-3)
    dispatcher.experience.quarantine(problem, "first", "all of it is NaN")
    assert explained(dispatcher)[0] == "second"
    assert explained(dispatcher, QUERY[:, :, :64])[0] == "first"
    dispatcher.experience.finish()
    for tune in ("ahead", "off"):
        later = fresh(cache=tmp_path, tune=tune)
        assert explained(later)[0] == "second"
        assert "all of it is NaN" in str(later.explain(QUERY, QUERY, QUERY))


def test_a_fault_under_a_tight_error_budget_does_not_hold_for_a_loose_one():
    dispatcher = fresh()
    tight = dispatcher.explain(QUERY, QUERY, QUERY, max_error=1e-4).problem
    dispatcher.experience.quarantine(tight, "first", "error 0.01 of at most 0.0001")
    assert dispatcher.explain(QUERY, QUERY, QUERY, max_error=1e-4).backend == "second"
    assert dispatcher.explain(QUERY, QUERY, QUERY, max_error=0.1).backend == "first"
    assert dispatcher.explain(QUERY, QUERY, QUERY).backend == "first"


def test_forgetting_drops_times_and_faults_of_the_class(tmp_path):
    dispatcher = fresh(cache=tmp_path)
    problem = measured(dispatcher, first=2e-3, second=1e-3)
    other = measured(dispatcher, QUERY[:, :, :64], first=2e-3, second=1e-3)
    dispatcher.experience.quarantine(problem, "second", "odd")
    dispatcher.experience.finish()
    dispatcher.experience.forget(problem, CPU)
    for one in (dispatcher, fresh(cache=tmp_path)):
        assert explained(one) == ("first", TABLE)
        assert one.experience.known(problem, CPU).faults == {}
        assert one.experience.known(other, CPU).winner == "second"


# Of which machine


@pytest.fixture
def more_threads():
    before = torch.get_num_threads()
    yield lambda: torch.set_num_threads(before + 1)
    torch.set_num_threads(before)


def test_another_number_of_threads_knows_nothing_and_coming_back_knows_it_again(more_threads, tmp_path):
    before = torch.get_num_threads()
    dispatcher = fresh(cache=tmp_path)
    measured(dispatcher, first=2e-3, second=1e-3)
    more_threads()
    assert explained(dispatcher) == explained(fresh(cache=tmp_path)) == ("first", TABLE)
    torch.set_num_threads(before)
    assert explained(dispatcher) == explained(fresh(cache=tmp_path)) == ("second", MEASURED)


def test_what_was_learnt_on_live_calls_is_learnt_anew_with_other_threads(more_threads):
    dispatcher = fresh(tune="live")
    for _ in range(20):
        dispatcher.attention(QUERY, QUERY, QUERY)
    assert set(dispatcher.explain(QUERY, QUERY, QUERY).known.seconds) == {"first", "second"}
    more_threads()
    plan = dispatcher.explain(QUERY, QUERY, QUERY)
    assert (plan.rung, plan.known.seconds) == (TABLE, {})
    course = dispatcher.experience.course(plan, CPU, ("first", "second"))
    assert course.windows == []


# Courses


def test_a_course_is_shared_by_the_calls_of_a_class():
    dispatcher = fresh(tune="live")
    plans = [dispatcher.explain(query, query, query) for query in (QUERY, QUERY[:, :, :120], QUERY[:, :, :64])]
    courses = [dispatcher.experience.course(plan, CPU, ("first", "second")) for plan in plans]
    assert courses[0] is courses[1] is not courses[2]


def test_a_call_whose_candidates_are_others_takes_no_part():
    """Lengths of one class may lie on both sides of a rewrite's threshold."""
    dispatcher = fresh(tune="live")
    plan = dispatcher.explain(QUERY, QUERY, QUERY)
    assert dispatcher.experience.course(plan, CPU, ("first", "first+chunk_queries")) is not None
    assert dispatcher.experience.course(plan, CPU, ("first", "second")) is None
    assert dispatcher.experience.course(plan, CPU, ("first", "first+chunk_queries", "second")) is not None


def test_there_is_no_course_where_nothing_is_to_be_learnt():
    dispatcher = fresh(tune="live")
    plan = dispatcher.explain(QUERY, QUERY, QUERY)
    assert dispatcher.experience.course(plan, CPU, ("first",)) is None
    measured(dispatcher, first=2e-3, second=1e-3)
    assert dispatcher.experience.course(plan, CPU, ("first", "second")) is None


def test_a_quarantined_strategy_leaves_every_course_of_its_class():
    dispatcher = fresh(tune="live")
    plan = dispatcher.explain(QUERY, QUERY, QUERY)
    course = dispatcher.experience.course(plan, CPU, ("first", "second"))
    dispatcher.experience.quarantine(plan.problem, "second", "odd")
    assert course.over


# Tallies


def test_a_tally_is_one_for_each_plan_of_each_exact_problem():
    dispatcher = fresh()
    plan, other = (dispatcher.explain(QUERY, QUERY, QUERY, scale=scale) for scale in (None, 0.3))
    experience = dispatcher.experience
    assert experience.tally(plan) is experience.tally(plan)
    assert experience.tally(plan) is not experience.tally(other)
    assert experience.tally(plan).trust is experience.tally(other).trust  # of one class


def test_an_option_without_a_hash_is_in_no_report():
    dispatcher = fresh()
    plan = dispatcher.explain(QUERY, QUERY, QUERY)
    object.__setattr__(plan.problem, "options", (("blocks", {"no": "hash"}),))
    assert dispatcher.experience.tally(plan).calls == 0
    assert not dispatcher.experience.tallies


# A broken disk


def test_a_store_that_cannot_be_written_breaks_no_call_and_is_told_once(tmp_path, caplog):
    folder = tmp_path / "cache"
    folder.write_text("a file, where a folder is wanted")
    dispatcher = fresh(tune="live", cache=folder)
    with caplog.at_level(logging.WARNING, "heedful"):
        for _ in range(30):
            out = dispatcher.attention(QUERY, QUERY, QUERY)
        measured(dispatcher, first=2e-3, second=1e-3)
        dispatcher.experience.quarantine(dispatcher.explain(QUERY, QUERY, QUERY).problem, "first", "odd")
        dispatcher.experience.finish()
    torch.testing.assert_close(out, F.scaled_dot_product_attention(QUERY, QUERY, QUERY))
    assert explained(dispatcher)[0] == "second"  # memory serves
    told = [record.getMessage() for record in caplog.records if "kept in memory" in record.getMessage()]
    assert len({text for text in told if "written" in text}) == len([text for text in told if "written" in text]) == 1
    assert folder.read_text() == "a file, where a folder is wanted"


def test_a_store_whose_writing_takes_long_holds_up_no_call(tmp_path, monkeypatch):
    dispatcher = fresh(tune="live", cache=tmp_path)
    going, done = threading.Event(), threading.Event()

    def stuck(*_):
        going.set()
        assert done.wait(30)

    monkeypatch.setattr(type(dispatcher.experience.store(CPU)), "add_window", stuck)
    for _ in range(40):
        dispatcher.attention(QUERY, QUERY, QUERY)
    assert going.wait(30)
    dispatcher.attention(QUERY, QUERY, QUERY)  # while the writer is stuck
    done.set()
    dispatcher.experience.finish()


# A strategy's own choices, such as tiles


class Tiled(Plain):
    """Remembers which choice each call went by; ``large`` cannot run."""

    used = []

    def tunable(self, problem):
        return {"forward": f"tiles {problem.head_dim}"}

    def compute_attention(self, query, key, value, *, tuning=None, **kwargs):
        label = None if tuning is None else tuning.get("forward")
        if label == "large":
            tuning.drop("forward", label, "out of resource:\nshared memory")
            label = None
        self.used.append(label)
        return super().compute_attention(query, key, value, **kwargs)


def tiled(**policy):
    factory = AttentionStrategyFactory(packages=(), plugins=False)
    factory.register_strategy("tiled", type("tiled", (Tiled,), {"used": []}))
    made = AttentionDispatcher(factory, policy=Policy({"*": ("tiled",)}, **{"tune": "ahead", **policy}))
    return made, factory.create_strategy("tiled").used


def measure_choices(dispatcher, count=2, key="tiles 64", **seconds):
    for window in windows(**seconds)[:count]:
        dispatcher.experience.store(CPU).add_window(key, window)


def test_a_choice_that_is_settled_is_handed_to_the_strategy_and_told(tmp_path):
    dispatcher, _ = tiled(cache=tmp_path)
    measure_choices(dispatcher, small=2e-3, wide=1e-3)
    for backend in (None, "tiled"):  # a process later, by auto and by name
        later, used = tiled(cache=tmp_path)
        plan = later.explain(QUERY, QUERY, QUERY, backend=backend)
        assert plan.tuned == {"forward": "wide"}
        assert "forward by wide" in str(plan)
        later.attention(QUERY, QUERY, QUERY, backend=backend)
        assert used == ["wide"]


@pytest.mark.parametrize("policy", [{"tune": "off"}, {}, {"tune": "live"}], ids=str)
def test_without_two_windows_that_agree_or_with_the_policy_off_the_default_is_taken(policy):
    dispatcher, used = tiled(**policy)
    measure_choices(dispatcher, count=2 if policy.get("tune") == "off" else 1, wide=1e-3)
    measure_choices(dispatcher, key="tiles 128", wide=1e-3)
    dispatcher.attention(QUERY, QUERY, QUERY)
    assert used == [None]
    assert dispatcher.explain(QUERY, QUERY, QUERY).tuned == {}


def test_a_choice_that_is_shipped_counts_until_one_is_measured_here(monkeypatch):
    record = Record(tuple(windows("theirs", theirs=1e-3)))
    monkeypatch.setattr(module, "shipped_for", lambda _: {"tiles 64": record})
    dispatcher, used = tiled()
    dispatcher.attention(QUERY, QUERY, QUERY)
    measure_choices(dispatcher, ours=1e-3)
    dispatcher.forget_plans()
    dispatcher.attention(QUERY, QUERY, QUERY)
    assert used == ["theirs", "ours"]


def test_a_choice_that_cannot_run_costs_one_warning_and_is_quarantined(tmp_path, caplog):
    dispatcher, used = tiled(cache=tmp_path)
    measure_choices(dispatcher, large=1e-3, wide=2e-3)
    for _ in range(3):
        dispatcher.attention(QUERY, QUERY, QUERY)
    dispatcher.forget_plans()
    dispatcher.attention(QUERY, QUERY, QUERY)
    assert used[:3] == [None] * 3
    assert "large" not in used
    assert [one.getMessage() for one in caplog.records] == [
        "heedful: tiles 64 by large cannot run (out of resource: shared memory); the default is taken"
    ]
    dispatcher.experience.finish()
    later, used = tiled(cache=tmp_path)
    assert later.experience.store(CPU).get("tiles 64").faults == {"large": "out of resource: shared memory"}
    later.attention(QUERY, QUERY, QUERY)
    assert used == ["wide"]  # the fastest of those that run
    later.experience.forget_choices(["tiles 64"], CPU)
    assert later.experience.store(CPU).get("tiles 64") is None
    assert tiled(cache=tmp_path)[0].explain(QUERY, QUERY, QUERY).tuned == {}


def test_dispatchers_of_one_registry_do_not_share_choices():
    """The strategy object is one: what was measured comes with each call."""
    first, used = tiled()
    measure_choices(first, wide=1e-3)
    second = AttentionDispatcher(first.factory, policy=Policy({"*": ("tiled",)}, tune="off"))
    for dispatcher in (first, second, first):
        dispatcher.attention(QUERY, QUERY, QUERY)
    assert used == ["wide", None, "wide"]


def test_a_compiled_call_goes_by_the_defaults():
    dispatcher, _ = tiled()
    measure_choices(dispatcher, wide=1e-3)
    problem = dispatcher.explain(QUERY, QUERY, QUERY).problem
    assert dispatcher.plan(problem, device=CPU).tuned == {"forward": "wide"}
    strategy = dispatcher.factory.create_strategy("tiled")
    plan = dispatcher.plan(problem.replace(compiling=True), "tiled", device=CPU)
    assert dispatcher.experience.tuning(plan, strategy, CPU) is None
