"""The exception tree: as its docstring draws it, complete in its texts, and able to cross processes."""

import inspect
import pickle

import pytest

from heedful import AttentionProblem, Refusal, errors
from heedful.errors import (
    CannotLoad,
    HeedfulError,
    InvalidArgument,
    LockBroken,
    NothingCovered,
    Refused,
    RegistrationError,
    UnknownBackend,
    WrongAnswer,
)

PROBLEM = AttentionProblem(batch=2, heads=4, kv_heads=4, query_length=77, key_length=1024, head_dim=72, value_dim=72)
REFUSALS = {
    "flash": (Refusal("dtype", "float32", "float16/bfloat16", "cast"), Refusal("head dim", "512", "at most 256")),
    "flex": (Refusal("device", "mps", "cuda"),),
}
EVERY = [
    InvalidArgument("key", "length 5", "query has 6"),
    UnknownBackend("flesh", ["flash", "flex"], "HEEDFUL_BACKEND"),
    RegistrationError("strategy 'x' is taken"),
    Refused(PROBLEM, REFUSALS),
    NothingCovered("no attention layer in Linear"),
    WrongAnswer(PROBLEM, "flash", "the output is not finite in query 3"),
    LockBroken("the lock run.lock was made elsewhere", ["  cpu: locked one, now another"]),
]
TREE = {
    InvalidArgument: ValueError,
    UnknownBackend: ValueError,
    RegistrationError: ValueError,
    Refused: RuntimeError,
    NothingCovered: RuntimeError,
    WrongAnswer: RuntimeError,
    LockBroken: RuntimeError,
    CannotLoad: ImportError,
}


def test_the_docstring_is_the_tree():
    made = {one for _, one in inspect.getmembers(errors, inspect.isclass) if one.__module__ == errors.__name__}
    assert made == {HeedfulError, *TREE}
    for one, also in TREE.items():
        assert issubclass(one, HeedfulError)
        assert issubclass(one, also)
        (line,) = (line for line in errors.__doc__.splitlines() if f"─ {one.__name__} " in line)
        assert f"(also {also.__name__})" in line


@pytest.mark.parametrize("error", EVERY, ids=lambda error: type(error).__name__)
def test_an_error_crosses_processes_whole(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_an_invalid_argument_gives_name_value_and_remedy():
    error = InvalidArgument("key", "length 5", "query has 6")
    assert (str(error), error.argument) == ("key: got length 5; query has 6", "key")


def test_an_unknown_backend_names_the_closest_and_all():
    text = str(UnknownBackend("flesh", ["native", "flex", "flash"], "HEEDFUL_BACKEND"))
    assert text.startswith("HEEDFUL_BACKEND: no backend is called 'flesh'; did you mean 'flash'")
    assert text.endswith("known: flash, flex, native")


def test_an_unknown_backend_that_resembles_none_makes_no_guess():
    assert "did you mean" not in str(UnknownBackend("§§", ["native", "flash"]))


def test_the_text_of_what_cannot_be_loaded_is_kept():
    """Sources raise it and the dispatcher turns it into a refusal; a strategy that is used alone lets it through."""
    error = CannotLoad("xformers.ops cannot be loaded: OSError: libcudart.so.11.0")
    assert isinstance(error, HeedfulError)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (CannotLoad, str(error))


def test_refused_holds_the_problem_and_every_reason():
    error = Refused(PROBLEM, REFUSALS)
    assert str(PROBLEM) in str(error)
    for name, reasons in REFUSALS.items():
        for reason in reasons:
            assert f"{name} refuses: {reason}" in str(error)
    assert (error.problem, error.refusals) == (PROBLEM, REFUSALS)


def test_names_with_commas_between_them_are_to_be_a_list():
    text = str(UnknownBackend("native,flash", ["native", "flash"]))
    assert "for an order of fallback give a list, ['native', 'flash']; known" in text
