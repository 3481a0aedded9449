"""Patches: instance attributes set and put back exactly, and what others set since."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from heedful.layers import Patch, leads_to, watch


class Owner(nn.Module):
    inherited = "of the class"

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        if value is not None:
            self.value = value


def test_an_attribute_is_put_back_or_deleted() -> None:
    owner = Owner("mine")
    patches = [Patch(owner, "value", "ours"), Patch(owner, "inherited", "ours")]
    for patch in patches:
        patch.apply()
    assert (owner.value, owner.inherited) == ("ours", "ours")
    for patch in patches:
        patch.undo()
    assert owner.value == "mine"
    assert "inherited" not in vars(owner)


def test_what_somebody_else_set_stays_unless_it_is_watched_and_to_be_restored() -> None:
    for watched, restore, stays in (
        (False, False, True),
        (False, True, True),
        (True, False, True),
        (True, True, False),
    ):
        owner = Owner("mine")
        patch = Patch(owner, "value", "ours", watched=watched)
        patch.apply()
        owner.value = "theirs"
        assert patch.displaced
        patch.undo(restore=restore)
        assert owner.value == ("theirs" if stays else "mine")
        patch.apply()
        assert owner.value == ("theirs" if stays else "ours")


def test_what_is_watched_only_is_not_changed_and_a_deleted_one_comes_back() -> None:
    owner = Owner("mine")
    patch = watch(owner, "value")
    patch.apply()
    assert (owner.value, patch.displaced) == ("mine", False)
    del owner.value
    assert patch.displaced
    patch.undo(restore=True)
    assert owner.value == "mine"


def test_submodules_are_watched_where_modules_hold_them_and_weights_are_never_taken_away() -> None:
    owner = Owner(old := nn.Linear(1, 1))
    patch = watch(owner, "value")
    patch.apply()
    assert not patch.displaced
    assert "value" not in vars(owner)
    owner.value = new = nn.Linear(1, 1)
    assert patch.displaced
    patch.undo(restore=True)
    assert owner.value is new
    assert old is not new
    plain = Owner("mine")
    patch = watch(plain, "value")
    plain.value = new
    patch.undo(restore=True)
    assert plain.value is new


def test_a_wrapper_leads_to_what_it_holds() -> None:
    def goal() -> None: ...

    def other() -> None: ...

    class Holder(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

    class Plain:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self) -> None:
            self.inner()

    for inner, found in ((goal, True), (other, False)):
        wrappers = (
            inner,
            lambda: inner(),  # noqa: B023
            functools.partial(inner, 1),
            functools.partial(print, inner),
            functools.update_wrapper(functools.partial(print), inner),
            functools.wraps(inner)(lambda: None),
            Plain(functools.partial(Plain(inner))),
        )
        assert [leads_to(wrapper, goal) for wrapper in wrappers] == [found] * len(wrappers)
    assert not leads_to(Holder(goal).parameters, goal)
