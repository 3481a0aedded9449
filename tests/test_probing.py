"""Kernels tried on a tiny problem: the good accepted once, the others refused with the text, and nothing disturbed."""

import contextlib
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F

from heedful import AttentionDispatcher, AttentionStrategy, Facts, Limits, Policy, Refused, attention_backend
from heedful import facts as machine
from heedful.errors import CannotLoad
from heedful.facts import DeviceFacts
from heedful.policy import current_wish
from heedful.probing import ready
from heedful.sources import Kernels, Package
from heedful.strategy import HALF

CPU = torch.device("cpu")
HERE = Facts("2", "3", "Linux", {"cpu": DeviceFacts("cpu")}, {"mine": "1.0"})


class Source(Package):
    """A package whose function is given."""

    def __new__(cls, _function):
        return super().__new__(cls)

    def __init__(self, function):
        super().__init__("mine", ("f",))
        object.__setattr__(self, "function", function)

    def load(self):
        return Kernels(f=self.function)


def strategy(function, **body):
    """A strategy around a kernel ``function(query, key, value, **more)``, which notes its calls."""
    calls = []

    def noted(query, key, value, **more):
        calls.append((query, more))
        return function(query, key, value, **more)

    def compute_attention(self, query, key, value, **more):
        return self.kernels.f(query, key, value, **more)

    body = {"limits": Limits(devices=("cpu",)), **body}
    kind = type("Tried", (AttentionStrategy,), {"compute_attention": compute_attention, "name": "tried", **body})
    kind.sources = (Source(noted),)
    made = kind()
    made.calls = calls
    return made


def right(query, key, value, **_more):
    return F.scaled_dot_product_attention(query, key, value)


def refusal(function, **body):
    (found,) = ready(strategy(function, **body), HERE, CPU)
    return str(found)


# What is refused, and what is not


def raising(query, key, value):
    raise RuntimeError("no kernel image is available for execution on the device")


def spoilt(number):
    def kernel(query, key, value):
        out = right(query, key, value)
        out[0, 1, 5, 3] = number
        return out

    return kernel


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (raising, "a tiny problem raised RuntimeError: no kernel image is available"),
        (lambda q, k, v: torch.randn(q.shape, generator=torch.Generator().manual_seed(3)), "cosine"),
        (lambda q, k, v: torch.zeros_like(q), "length 0.000"),
        (lambda q, k, v: right(q, k, v) * 2, r"cosine 1.000 to the formula, length 2.000"),
        (lambda q, k, v: -right(q, k, v), "cosine -1.000"),
        (lambda q, k, v: right(q * 8, k, v), "cosine"),
        (spoilt(float("nan")), "cosine nan"),
        (spoilt(float("inf")), "cosine nan"),
        (lambda q, k, v: right(q, k, v).transpose(1, 2), "float32 of shape (1, 64, 2, 64) on cpu on a tiny problem"),
        (lambda q, k, v: right(q, k, v)[:, :1], "float32 of shape (1, 1, 64, 64)"),
        (lambda q, k, v: right(q, k, v).mean(), "float32 of shape ()"),
        (lambda q, k, v: right(q, k, v).double(), "float64 of shape (1, 2, 64, 64)"),
        (lambda q, k, v: right(q, k, v).to("meta"), "on meta"),
        (lambda q, k, v: (right(q, k, v), None), "tuple on a tiny problem, it takes a tensor"),
        (lambda q, k, v: None, "NoneType on a tiny problem"),
        (lambda q, k: None, "a tiny problem raised TypeError"),
    ],
)
def test_a_kernel_that_does_not_work_is_refused_with_the_text(kernel, words):
    text = refusal(kernel)
    assert text.startswith("probe is ")
    assert words in text


def test_a_kernel_that_cannot_be_loaded_is_refused_with_the_text():
    class Broken(Source):
        def load(self):
            raise CannotLoad("mine cannot be loaded: ImportError: libcudart.so.11.0: cannot open shared object file")

    one = strategy(right)
    type(one).sources = (Broken(None),)
    for _ in range(2):
        (found,) = ready(one, HERE, CPU)
        assert found.field == "import"
        assert "libcudart.so.11.0" in str(found)


def test_a_good_kernel_is_tried_once_and_remembered_for_each_device():
    one = strategy(right)
    for _ in range(3):
        assert ready(one, HERE, CPU) == ()
    assert len(one.calls) == 1
    (found,) = ready(one, HERE, torch.device("cuda:7"))  # not there; limits are only asked once a device is
    assert found.field == "probe"
    assert len(one.calls) == 1
    assert ready(one, HERE, CPU) == ()


def test_a_bad_kernel_is_tried_once_too():
    one = strategy(raising)
    assert ready(one, HERE, CPU) == ready(one, HERE, CPU) != ()
    assert len(one.calls) == 1


def test_each_object_is_tried_for_itself():
    one, other = strategy(right), strategy(raising)
    assert ready(one, HERE, CPU) == ()
    assert ready(other, HERE, CPU) != ()


def test_memory_that_runs_out_says_nothing_about_the_kernel():
    left = [True]

    def kernel(query, key, value):
        if left and left.pop():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(query, key, value)

    one = strategy(kernel)
    (found,) = ready(one, HERE, CPU)
    assert "OutOfMemoryError: CUDA out of memory" in str(found)
    assert ready(one, HERE, CPU) == ()


def test_a_strategy_without_sources_is_taken_at_its_word():
    class Own(AttentionStrategy):
        def compute_attention(self, query, key, value):
            raise AssertionError("is not tried")

    assert ready(Own(), HERE, CPU) == ()


def test_on_a_meta_device_nothing_can_be_tried():
    one = strategy(raising, limits=Limits())
    assert ready(one, HERE, torch.device("meta")) == ()
    assert one.calls == []


# What it is tried with


@pytest.mark.parametrize("layout", ["BHSD", "BSHD", "THD"])
def test_it_is_tried_in_its_own_layout(layout):
    def kernel(query, key, value, varlen=None):
        assert (varlen is not None) == (layout == "THD")
        if layout == "BHSD":
            return right(query, key, value)
        if layout == "BSHD":
            return right(*(t.transpose(1, 2) for t in (query, key, value))).transpose(1, 2)
        assert varlen.cu_seqlens_q.tolist() == varlen.cu_seqlens_k.tolist() == [0, len(query)]
        assert varlen.max_seqlen_q == varlen.max_seqlen_k == len(query)
        return right(*(t.transpose(0, 1)[None] for t in (query, key, value)))[0].transpose(0, 1)

    limits = Limits(devices=("cpu",), layouts=(layout,), masks=frozenset({"varlen"}))
    assert ready(strategy(kernel, limits=limits), HERE, CPU) == ()


@pytest.mark.parametrize(
    ("limits", "dim"),
    [
        ({}, 64),
        ({"min_head_dim": 80}, 80),
        ({"max_head_dim": 32}, 32),
        ({"head_dim_multiple": 24}, 72),
        ({"head_dim_multiple": 24, "max_head_dim": 64}, 48),
        ({"head_dim_multiple": 128, "min_head_dim": 128, "max_head_dim": 128}, 128),
    ],
)
def test_it_is_tried_with_a_head_dim_that_it_takes(limits, dim):
    one = strategy(right, limits=Limits(devices=("cpu",), **limits))
    assert ready(one, HERE, CPU) == ()
    assert one.calls[0][0].shape[-1] == dim


def test_the_names_of_its_parameters_are_its_own():
    one = strategy(right, compute_attention=lambda self, q, k, v: self.kernels.f(q, k, v))
    assert ready(one, HERE, CPU) == ()


def test_it_is_tried_with_the_first_dtype_that_it_takes():
    def refusals(self, problem):
        return () if problem.dtype == torch.bfloat16 else ("not this one",)

    one = strategy(right, limits=Limits(devices=("cpu",), dtypes=HALF), refusals=refusals)
    assert ready(one, HERE, CPU) == ()
    assert [query.dtype for query, _ in one.calls] == [torch.bfloat16]


def test_what_takes_no_plain_call_is_not_tried():
    one = strategy(raising, refusals=lambda self, problem: ("causal only",))
    assert ready(one, HERE, CPU) == ()
    assert one.calls == []


def test_its_own_validation_is_asked_before():
    def validate_constraints(self, **call):
        if call["query"].shape[-1] != 16:
            raise ValueError("compiled for head dim 16")

    one = strategy(raising, validate_constraints=validate_constraints)
    assert ready(one, HERE, CPU) == ()
    assert one.calls == []


def test_a_pretended_gpu_is_asked_by_its_limits():
    pretended = Facts("2", "3", "Linux", {"cpu": DeviceFacts.parse("sm_80")}, {"mine": ""})
    one = strategy(right, limits=Limits(devices=("cuda",), min_capability=(8, 0), dtypes=HALF))
    assert ready(one, pretended, CPU) == ()
    assert one.calls[0][0].dtype == torch.float16


def test_quantised_kernels_pass():
    def rounded(tensor):
        scale = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / scale).round() * scale

    assert ready(strategy(lambda q, k, v: right(rounded(q), rounded(k), v), exactness="quantised"), HERE, CPU) == ()


# What is left as it was


class Mode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was seen by the caller's mode")


class Dispatch(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was seen by the caller's mode")


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def fake():
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode()


AROUND = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
    "a default dtype": float64_by_default,
    "a default device": lambda: torch.device("meta"),
    "a function mode": Mode,
    "a dispatch mode": Dispatch,
    "fake tensors": fake,
    "a scope": lambda: attention_backend("reference"),
}


def state():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        len(torch.overrides._get_current_function_mode_stack()),
        torch.utils._python_dispatch._len_torch_dispatch_stack(),
        current_wish(),
        torch.get_num_threads(),
        list(warnings.filters),
    )


@pytest.mark.parametrize("name", AROUND)
def test_the_callers_modes_do_not_reach_the_kernel_and_stay(name):
    seen = []

    def kernel(query, key, value):
        seen.append((query.is_inference(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        seen.append(current_wish())
        return right(query, key, value)

    one = strategy(kernel)
    with AROUND[name]():
        before = state()
        found = ready(one, HERE, CPU)
        assert state() == before
    assert found == ()
    assert seen == [(False, False, False), None]


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_functorch_does_not_reach_the_kernel(transform):
    one = strategy(right)

    def function(x):
        assert ready(one, HERE, CPU) == ()
        return (x * 2).sum()

    getattr(torch.func, transform)(function)(torch.ones(3))
    assert len(one.calls) == 1


def test_a_kernel_that_fails_under_deterministic_algorithms_is_not_refused_without_them():
    def kernel(query, key, value):
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("does not have a deterministic implementation")
        return right(query, key, value)

    one = strategy(kernel)
    with deterministic():
        assert ready(one, HERE, CPU) != ()
    assert ready(one, HERE, CPU) == ()


@pytest.mark.parametrize("kernel", [right, lambda q, k, v: right(q, k, v) + 0 * torch.rand(()), raising])
def test_random_states_are_as_before(kernel):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    ready(strategy(kernel), HERE, CPU)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_kernel_that_warns_is_silent_and_not_refused():
    def kernel(query, key, value):
        warnings.warn("the first call compiles", stacklevel=1)
        return right(query, key, value)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        assert ready(strategy(kernel), HERE, CPU) == ()
    assert caught == []


def test_no_gradient_is_recorded():
    seen = []

    def kernel(query, key, value):
        seen.append(torch.is_grad_enabled())
        return right(query, key, value)

    assert ready(strategy(kernel), HERE, CPU) == ()
    assert seen == [False]


# Threads, interrupts, and kernels that call heedful


def test_threads_that_ask_at_once_try_once():
    arrived, barrier, found = threading.Event(), threading.Barrier(4), []

    def kernel(query, key, value):
        arrived.wait(0.2)
        return right(query, key, value)

    one = strategy(kernel)

    def ask():
        barrier.wait()
        found.append(ready(one, HERE, CPU))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [()] * 4
    assert len(one.calls) == 1


def test_an_interrupt_passes_through_and_is_not_remembered():
    once = [KeyboardInterrupt()]

    def kernel(query, key, value):
        if once:
            raise once.pop()
        return right(query, key, value)

    one = strategy(kernel)
    with pytest.raises(KeyboardInterrupt):
        ready(one, HERE, CPU)
    assert ready(one, HERE, CPU) == ()


def test_a_kernel_may_ask_heedful_in_its_turn():
    inner = strategy(right)
    found = []

    def kernel(query, key, value):
        found.append(ready(inner, HERE, CPU))
        found.append(ready(outer, HERE, CPU))
        return right(query, key, value)

    outer = strategy(kernel)
    assert ready(outer, HERE, CPU) == ()
    assert found == [(), ()]
    assert inner.calls == [], "a trial inside a trial is none"


# Through the dispatcher


@pytest.fixture
def tensors():
    return [torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0)) for _ in range(3)]


@pytest.fixture
def with_noise(factory):
    """A dispatcher that knows a strategy whose package is there and whose answers are noise."""
    noise = type(strategy(lambda q, k, v: torch.zeros_like(q)))
    factory.register_strategy("noise", noise)
    here = machine.probe()
    facts = Facts(here.torch_version, here.python_version, here.system, {"cpu": here.devices["cpu"]}, {"mine": "1"})
    return AttentionDispatcher(factory, facts, Policy({"*": ("noise", "native")}))


def test_a_kernel_that_answers_noise_is_passed_over_and_explained(with_noise, tensors):
    expected = F.scaled_dot_product_attention(*tensors)
    assert torch.equal(with_noise.attention(*tensors), expected)
    assert torch.equal(with_noise.attention(*tensors, backend=["noise", "native"]), expected)
    with pytest.raises(Refused, match=r"noise refuses: probe is cosine 0\.000 to the formula, length 0\.000"):
        with_noise.attention(*tensors, backend="noise")
    plan = with_noise.explain(*tensors)
    assert plan.backend == "native"
    assert "- noise             refuses: probe is cosine 0.000" in str(plan)
    assert not with_noise.list_backends("cpu")["noise"].available
    assert "probe is cosine 0.000" in str(with_noise.list_backends("cpu"))
