"""``import heedful``: the public names, their documentation, and what loading them costs."""

import importlib
import inspect
import json
import pkgutil
from importlib.metadata import version

import pytest

import heedful

# What a plain `import heedful` must never load, beyond what torch itself has loaded.
OPTIONAL = {
    "PIL", "aiter", "comfy", "diffusers", "filelock", "flash_attn", "flash_attn_interface", "huggingface_hub",
    "hypothesis", "jinja2", "kernels", "numpy", "platformdirs", "pytest", "rich", "safetensors", "sageattention",
    "sageattn3", "sklearn", "torch_npu", "torch_xla", "transformers", "triton", "typer", "xformers",
}  # fmt: skip
HEAVY = {"torch._dynamo", "torch._inductor", "torch.nn.attention.flex_attention", "torch._higher_order_ops"}

SCRIPT = """
import json, os, sys, time
import torch
os.environ |= {"HEEDFUL_TUNE": "live", "HEEDFUL_GUARD": "replace"}
before = set(sys.modules)
start = time.perf_counter()
import heedful
seconds = time.perf_counter() - start
imported = sorted(set(sys.modules) - before)
one = torch.ones(1, 1, 2, 8)
heedful.attention(one, one, one)
called = sorted(set(sys.modules) - before)
print(json.dumps({"seconds": seconds, "imported": imported, "called": called}))
"""


@pytest.fixture(scope="module")
def loaded(fresh_python):
    ended = fresh_python(SCRIPT)
    assert (ended.returncode, ended.stderr) == (0, "")
    return json.loads(ended.stdout)


def within(names, modules):
    return {name for name in names if any(name == one or name.startswith(f"{one}.") for one in modules)}


def test_importing_loads_nothing_optional_or_heavy(loaded):
    print(f"import heedful, after torch: {loaded['seconds'] * 1e3:.1f} ms, {len(loaded['imported'])} modules")
    assert within(loaded["imported"], OPTIONAL | HEAVY) == set()
    assert within(loaded["called"], (OPTIONAL | HEAVY) - {"platformdirs"}) == set()  # that knows where times are kept


def test_importing_loads_heedfuls_own_modules_and_a_few_of_the_standard_library(loaded):
    own = {name for name in loaded["imported"] if name.split(".")[0] == "heedful"}
    assert len(set(loaded["imported"]) - own) <= 8, sorted(set(loaded["imported"]) - own)
    for lazy in ("strategies", "integrations", "testing", "cli", "demo", "cases"):
        assert within(own, {f"heedful.{lazy}"}) == set()


def test_explaining_and_listing_on_a_cpu_loads_nothing_optional_either(fresh_python):
    script = """
import json, sys
import torch
before = set(sys.modules)
import heedful
one = torch.ones(1, 1, 2, 8)
heedful.explain(one, one, one)
heedful.list_backends("cpu")
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    ended = fresh_python(script)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert within(json.loads(ended.stdout), OPTIONAL) == set()


def test_strategies_are_loaded_by_the_first_call(loaded):
    assert within(loaded["called"], {"heedful.strategies.native"})


# Public names


def test_the_public_names_are_those_of_all():
    submodules = {module.name for module in pkgutil.iter_modules(heedful.__path__)}
    assert {name for name in dir(heedful) if not name.startswith("_")} - submodules == set(heedful.__all__)
    assert len(set(heedful.__all__)) == len(heedful.__all__)


@pytest.mark.parametrize("name", heedful.__all__)
def test_a_public_name_is_documented(name):
    thing = getattr(heedful, name)
    doc = inspect.getdoc(thing)
    assert doc
    assert doc[0].isupper()
    assert not doc.startswith(f"{name}("), "a signature that dataclass wrote is no documentation"


def test_no_public_name_hides_a_module():
    for name in heedful.__all__:
        assert not inspect.ismodule(getattr(heedful, name))


def test_the_version_is_that_of_the_package():
    assert heedful.__version__ == version("heedful")


# Everything public in public modules

SHIPPED = [module.name for module in pkgutil.walk_packages(heedful.__path__, "heedful.")]


@pytest.mark.parametrize("name", ["heedful", *SHIPPED])
def test_everything_public_has_a_docstring(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] == "heedful":
            raise
        pytest.skip(f"needs {error.name}")
    assert module.__doc__, name
    lacking = []
    for public, thing in vars(module).items():
        if public.startswith("_") or getattr(thing, "__module__", None) != name:
            continue
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        lacking += [] if inspect.getdoc(thing) else [public]
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            documented = isinstance(value, (property, classmethod, staticmethod)) or inspect.isfunction(value)
            if documented and not member.startswith("_") and not inspect.getdoc(getattr(thing, member)):
                lacking.append(f"{public}.{member}")
    assert lacking == []
