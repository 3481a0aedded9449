"""Locks: the plans of a run written down, replayed bit for bit, or refused with every difference as text."""

import json

import pytest
import torch
import torch.nn.functional as F

from heedful import (
    AttentionDispatcher,
    AttentionStrategy,
    AttentionStrategyFactory,
    InvalidArgument,
    Limits,
    LockBroken,
    Policy,
    WrongAnswer,
)
from heedful.locks import Lock
from heedful.records import Window

DRAW = torch.Generator().manual_seed(0)
QUERY, KEY = (torch.randn(1, 4, length, 64, generator=DRAW) for length in (128, 144))


class Plain(AttentionStrategy):
    limits = Limits(masks=frozenset({"causal"}), scale=True)

    def compute_attention(self, query, key, value, **kwargs):
        return F.scaled_dot_product_attention(query, key, value, **kwargs)


class Other(Plain):
    """The same function, other bits."""

    def compute_attention(self, query, key, value, **kwargs):
        return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1) @ value


def fresh(order=("Plain", "Other"), kinds=(Plain, Other), **policy):
    factory = AttentionStrategyFactory(packages=(), plugins=False)
    for kind in kinds:
        factory.register_strategy(kind.__name__, kind)
    return AttentionDispatcher(factory, policy=Policy({"*": order}, **policy))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.lock"


def test_what_was_locked_runs_whatever_the_table_says_now(path):
    first = fresh(("Other", "Plain"))
    out = first.attention(QUERY, KEY, KEY)
    first.lock(path)
    assert not torch.equal(out, fresh().attention(QUERY, KEY, KEY))
    later = fresh()
    later.use_lock(path)
    assert torch.equal(later.attention(QUERY, KEY, KEY), out)
    plan = later.explain(QUERY, KEY, KEY)
    assert (plan.backend, plan.rung) == ("Other", "lock")
    later.use_lock(None)
    assert later.explain(QUERY, KEY, KEY).backend == "Plain"


def test_two_runs_under_one_lock_are_equal_to_the_bit(path, factory):
    """Live learning before it, a fresh dispatcher each: as two processes."""
    half = QUERY.half()

    def run(lock):
        dispatcher = AttentionDispatcher(factory, policy=Policy(tune="live"))
        if lock:
            dispatcher.use_lock(path)
        outs = [dispatcher.attention(half, half, half, is_causal=causal) for causal in (True, False) * 15]
        if not lock:
            dispatcher.lock(path)
        return torch.stack(outs)

    run(lock=False)
    one, two = run(lock=True), run(lock=True)
    assert torch.equal(one, two)
    assert all(torch.equal(out, one[place % 2]) for place, out in enumerate(one))


def test_rewrites_are_locked_too(path, factory):
    half = QUERY.half()
    bare = AttentionDispatcher(factory, policy=Policy())
    bare.attention(half, half, half)
    (plan,) = bare.lock(path).plans.values()
    assert (plan.label, plan.steps, plan.repeats) == ("native+upcast", ("upcast",), "bits")
    assert plan.version == f"torch {torch.__version__}"
    data = json.loads(path.read_text())
    data["plans"][0] |= {"candidate": "native", "lowerings": []}
    path.write_text(json.dumps(data))
    later = AttentionDispatcher(factory, policy=Policy())
    later.use_lock(path)
    assert later.explain(half, half, half).chosen.steps == ()


def test_a_lock_fixes_auto_and_nothing_else(path):
    first = fresh()
    first.attention(QUERY, KEY, KEY)
    first.attention(QUERY, QUERY, QUERY, backend="Other")
    assert len(first.lock(path).plans) == 1
    later = fresh()
    later.use_lock(path)
    later.attention(QUERY, QUERY, QUERY, backend="Other")
    later.attention(QUERY, QUERY, QUERY, backend=["Other", "Plain"])


def test_a_call_that_is_not_in_it_fails_with_the_nearest_that_is(path):
    first = fresh()
    first.attention(QUERY, KEY, KEY)
    first.lock(path)
    later = fresh()
    later.use_lock(path)
    with pytest.raises(
        LockBroken, match=r"(?s)no plan for this call.*locked: B1 H4 Q128 K144.*called: B1 H4 Q128 K128"
    ):
        later.attention(QUERY, QUERY, QUERY)


def test_other_versions_and_machines_break_it_with_every_difference(path):
    first = fresh()
    first.attention(QUERY, KEY, KEY)
    first.lock(path)
    data = json.loads(path.read_text())
    data["machine"]["cpu"] = "another"
    data["plans"][0]["version"] = "torch 1.0"
    path.write_text(json.dumps(data))
    later = fresh()
    with pytest.raises(LockBroken, match=r"(?s)cpu: locked another, now .*locked Plain torch 1.0, now Plain torch"):
        later.use_lock(path)
    assert later.experience.lock is None
    gone = fresh(("Other",), (Other,))
    with pytest.raises(LockBroken, match=r"locked Plain .*, now it cannot run"):
        gone.use_lock(path)


def test_a_wrong_answer_under_a_lock_raises(path):
    class Breaks(Plain):
        broken = False

        def compute_attention(self, query, key, value, **kwargs):
            return super().compute_attention(query, key, value, **kwargs) + Breaks.broken

    first = fresh(("Breaks", "Plain"), (Breaks, Plain))
    first.attention(QUERY, KEY, KEY)
    first.lock(path)
    Breaks.broken = True
    later = fresh(("Breaks", "Plain"), (Breaks, Plain))
    later.use_lock(path)
    with pytest.raises(WrongAnswer):
        later.attention(QUERY, KEY, KEY)


def test_as_a_context_manager_it_ends_with_the_block(path):
    first = fresh(("Other", "Plain"))
    first.attention(QUERY, KEY, KEY)
    first.lock(path)
    later = fresh()
    with later.use_lock(path):
        assert later.explain(QUERY, KEY, KEY).backend == "Other"
    assert later.explain(QUERY, KEY, KEY).backend == "Plain"


def test_nothing_is_learnt_under_it(path):
    first = fresh(tune="live")
    first.attention(QUERY, KEY, KEY)
    first.lock(path)
    later = fresh(tune="live")
    with later.use_lock(path):
        for _ in range(20):
            later.attention(QUERY, KEY, KEY)
        assert {label for _, _, label in later.experience.tallies} == {"Plain"}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"format": 1, "kind": "lock"}', '{"format": 2, "kind": "lock", "plans": [], "machine": {}}',
     '{"format": 1, "kind": "lock", "machine": {}, "plans": [{}]}',
     '{"format": 1, "kind": "lock", "machine": 3, "plans": []}',
     '{"format": 1, "kind": "trace", "machine": {}, "plans": []}', "[" * 100_000],
)  # fmt: skip
def test_a_file_that_is_none_is_refused_by_name(path, text):
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=r"lock: got .*run\.lock; it cannot be read"):
        fresh().use_lock(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch", "2"), ("batch", -1), ("heads", 2.5), ("dtype", "int"), ("device", 3), ("layout", "HH"), ("mask", {}),
     ("scale", "x"), ("options", [["a"]]), ("needs_grad", 1), ("unknown", 1), ("capability", "90")],
)  # fmt: skip
def test_each_field_of_a_problem_is_checked(path, field, value):
    first = fresh()
    first.attention(QUERY, KEY, KEY)
    first.lock(path)
    data = json.loads(path.read_text())
    data["plans"][0]["problem"][field] = value
    path.write_text(json.dumps(data))
    with pytest.raises(InvalidArgument, match="cannot be read"):
        Lock.load(path)


def test_a_file_that_cannot_be_written_leaves_what_was_there(path, monkeypatch):
    first = fresh()
    first.attention(QUERY, KEY, KEY)
    first.lock(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        first.lock(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


# A strategy's own choices, such as tiles


class Tiled(Plain):
    """Other bits by every choice; ``large`` cannot run."""

    def tunable(self, _problem):
        return {"forward": "tiles"}

    def compute_attention(self, query, key, value, *, tuning=None, **kwargs):
        label = None if tuning is None else tuning.get("forward")
        if label == "large":
            tuning.drop("forward", label, "out of shared memory")
        return super().compute_attention(query, key, value, **kwargs) + 2e-7 * len(label or "")


def tiled(folder):
    return fresh(("Tiled",), (Tiled,), tune="ahead", cache=folder)


def measure(dispatcher, label):
    store = dispatcher.experience.store(torch.device("cpu"))
    store.forget("tiles")
    for place in range(2):
        store.add_window("tiles", Window(ended=1e9 + 20.0 * place, run=f"{place}", seconds={label: 1e-3}, turns=5))
    dispatcher.forget_plans()


def test_a_locked_choice_runs_whatever_was_measured_since(path, tmp_path):
    first = tiled(tmp_path)
    measure(first, "wide")
    out = first.attention(QUERY, KEY, KEY)
    (plan,) = first.lock(path).plans.values()
    assert plan.tuned == {"forward": "wide"}
    later = tiled(tmp_path)
    measure(later, "another")
    assert not torch.equal(later.attention(QUERY, KEY, KEY), out)
    with later.use_lock(path):
        assert torch.equal(later.attention(QUERY, KEY, KEY), out)
        assert later.explain(QUERY, KEY, KEY).tuned == {"forward": "wide"}
        assert later.lock(path.with_name("again.lock")).plans == Lock.load(path).plans
    assert not torch.equal(later.attention(QUERY, KEY, KEY), out)


def test_a_lock_without_choices_means_the_defaults(path, tmp_path):
    first = tiled(tmp_path)
    out = first.attention(QUERY, KEY, KEY)
    first.lock(path)
    assert "tuned" not in json.loads(path.read_text())["plans"][0]  # as locks were before there were any
    measure(first, "wide")
    with first.use_lock(path):
        assert torch.equal(first.attention(QUERY, KEY, KEY), out)


def test_a_locked_choice_that_cannot_run_raises_and_nothing_else_computes(path, tmp_path):
    first = tiled(tmp_path)
    first.attention(QUERY, KEY, KEY)
    first.lock(path)
    data = json.loads(path.read_text())
    data["plans"][0]["tuned"] = {"forward": "large"}
    path.write_text(json.dumps(data))
    with (
        first.use_lock(path),
        pytest.raises(LockBroken, match=r"(?s)cannot run here.*locked forward by large, now out"),
    ):
        first.attention(QUERY, KEY, KEY)


def test_a_choice_that_is_none_of_the_strategy_s_breaks_it(path):
    first = fresh()
    first.attention(QUERY, KEY, KEY)
    first.lock(path)
    data = json.loads(path.read_text())
    data["plans"][0]["tuned"] = {"forward": "wide"}
    path.write_text(json.dumps(data))
    with pytest.raises(LockBroken, match=r"locked Plain torch \S+, forward by wide, now Plain torch \S+$"):
        fresh().use_lock(path)


@pytest.mark.parametrize("tuned", [3, "wide", ["wide"], {"forward": 3}, {"forward": ["wide"]}, None], ids=str)
def test_choices_that_are_no_names_are_refused(path, tuned):
    first = fresh()
    first.attention(QUERY, KEY, KEY)
    first.lock(path)
    data = json.loads(path.read_text())
    data["plans"][0]["tuned"] = tuned
    path.write_text(json.dumps(data))
    with pytest.raises(InvalidArgument, match="cannot be read"):
        Lock.load(path)
