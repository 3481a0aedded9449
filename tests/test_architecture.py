"""The shape of the source: imports go one way, optional packages stay inside functions, files stay small.

``ORDER`` is the list in docs/architecture.md: a module imports only from those before it.
"""

import ast
import functools
import graphlib
import io
import sys
import tokenize
from pathlib import Path

import pytest

from heedful import factory as registry

ROOT = Path(registry.__file__).parent
LAYERS = (ROOT.parent.parent / "docs" / "architecture.md").read_text("utf-8").partition("\n## Layers")[2]
ORDER = tuple(line.split()[0] for line in LAYERS.split("```")[1].splitlines() if line.strip())
# Loaded by their commands only, and free to import what those need.
COMMANDS = ("cli", "demo", "bench")
MOST_LINES = 400
# flex: two ways to run it, of which the CPU's goes once it compiles there; xformers: two operators behind one name.
MOST_LINES_OF_A_STRATEGY = {"flex": 175, "xformers": 125}
FILES = sorted(ROOT.rglob("*.py"))


def name_of(path):
    """``heedful.strategies.flex`` for its file."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


@functools.cache
def tree(module):
    return ast.parse(MODULES[module].read_text("utf-8"))


@functools.cache
def imports(module):
    """Every import of a module: its name, and whether it is at "module", "function" or "typing" level."""
    found = []

    def visit(node, level):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, level) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module} imports relatively"
                for alias in child.names:
                    inner = f"{child.module}.{alias.name}"
                    found.append((inner if inner in MODULES else child.module, level))
            deeper = level
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                deeper = "function"
            elif isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
                deeper = "typing"
            visit(child, deeper)

    visit(tree(module), "module")
    return found


def own_imports(module):
    """What a module imports of heedful when it runs, at once or later."""
    return {name for name, level in imports(module) if level != "typing" and name.split(".")[0] == "heedful"}


def group(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def code_lines(path):
    """The lines that hold code: neither blank, nor comment, nor docstring."""
    text = path.read_text("utf-8")
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


# Imports


def test_the_order_names_everything_there_is():
    assert set(ORDER) == {group(module) for module in MODULES}
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_those_before_it(module):
    place = ORDER.index(group(module))
    for name in own_imports(module):
        assert name in MODULES, f"{module} imports {name}, which is no module"
        assert group(name) == group(module) or ORDER.index(group(name)) < place, f"{module} imports {name}"


def test_no_modules_import_each_other_in_a_circle():
    """Within packages too, and counting what functions import."""
    graph = {module: own_imports(module) - {module} for module in MODULES}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", MODULES)
def test_packages_other_than_torch_are_imported_by_functions(module):
    known = {"heedful", "torch", *sys.stdlib_module_names}
    if group(module) == "kernels":  # a Triton kernel is decorated at module level
        known.add("triton")
    outside = {name for name, level in imports(module) if level == "module" and name.split(".")[0] not in known}
    if group(module) not in COMMANDS:
        assert outside == set()


@pytest.mark.parametrize("module", MODULES)
def test_kernels_are_imported_by_functions_alone(module):
    """Or ``import heedful`` and the scan for strategies would import triton."""
    if group(module) != "kernels":
        assert [name for name, level in imports(module) if group(name) == "kernels" and level == "module"] == []


@pytest.mark.parametrize("lazy", ["demo", "bench"])
def test_commands_load_the_demo_and_the_bench_only_when_they_run(lazy):
    for module in MODULES:
        if group(module) != lazy:
            assert [name for name, level in imports(module) if group(name) == lazy and level == "module"] == []


@pytest.mark.parametrize("module", MODULES)
def test_no_module_reaches_for_the_private_names_of_another(module):
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "heedful":
            assert [alias.name for alias in node.names if alias.name.startswith("_")] == []


# What the source does not do


def calls(module):
    """The dotted names that a module calls."""
    return {ast.unparse(node.func) for node in ast.walk(tree(module)) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_process_wide_nor_unsafe_is_called(module):
    last = {name.rpartition(".")[2] for name in calls(module)}
    assert not last & {"sdpa_kernel", "enable_flash_sdp", "enable_math_sdp", "enable_mem_efficient_sdp"}
    assert not calls(module) & {"eval", "exec", "torch.load", "__import__"}
    assert not {name for name, _ in imports(module)} & {"pickle", "marshal", "shelve", "dill"}


@pytest.mark.parametrize("module", MODULES)
def test_the_world_is_not_probed_by_failing(module):
    handlers = [node for node in ast.walk(tree(module)) if isinstance(node, ast.ExceptHandler)]
    caught = {ast.unparse(handler.type) if handler.type else "everything" for handler in handlers}
    assert not caught & {"ImportError", "ModuleNotFoundError", "everything"} or group(module) in COMMANDS


def test_the_environment_is_read_in_one_place_beside_the_variables_of_other_libraries():
    readers = {module for module, path in MODULES.items() if "os.environ" in path.read_text("utf-8")}
    # The doctor reads it as a fact.
    assert readers == {"heedful.policy", "heedful.sources", "heedful.facts", "heedful.doctor.look"}
    assert (ROOT / "facts.py").read_text("utf-8").count("os.environ") == 1  # TRITON_INTERPRET, as Triton reads it
    assert (ROOT / "sources.py").read_text("utf-8").count("os.environ") == 1  # LOCAL_KERNELS, as `kernels` reads it


# Files


def test_no_file_is_called_utils():
    assert [path for path in FILES if path.stem in {"utils", "util", "helpers", "common", "misc"}] == []


@pytest.mark.parametrize("path", FILES, ids=map(name_of, FILES))
def test_files_are_small(path):
    assert code_lines(path) <= MOST_LINES


@pytest.mark.parametrize("path", sorted((ROOT / "strategies").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_strategy_is_one_small_file_of_its_name_and_so_are_the_forms_of_one_kernel(path):
    assert code_lines(path) <= MOST_LINES_OF_A_STRATEGY.get(path.stem, 120)
    module = __import__(f"heedful.strategies.{path.stem}", fromlist=["*"])
    names = [strategy.name for strategy in registry._in_module(module)]
    family = path.stem.partition("_")[0]
    assert names == [path.stem] or (len(names) > 1 and all(name.startswith(f"{family}_") for name in names))


if __name__ == "__main__":
    for one in FILES:
        print(f"{code_lines(one):4} {name_of(one)}")
