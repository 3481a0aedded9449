"""Write down the signatures of a package's functions, read from its sources without importing them.

    python tests/signatures/record.py --package flash-attn --version 2.8.3 --source flash_attn-2.8.3.tar.gz \\
        --root unpacked/flash_attn-2.8.3 --out tests/signatures/flash_attn.json \\
        flash_attn.flash_attn_interface:flash_attn_func flash_attn.flash_attn_interface:flash_attn_varlen_func

``--root`` holds the modules (``flash_attn/flash_attn_interface.py``). A function is named ``module.path:function`` or
``module.path:Class.method``. ``--version`` is a release or a commit, ``--source`` a file name on PyPI or a public URL.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    """Read the arguments, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", required=True, help="name of the distribution")
    parser.add_argument("--version", required=True, help="release, or commit")
    parser.add_argument("--source", required=True, help="file name on PyPI, or public URL")
    parser.add_argument("--root", required=True, type=Path, help="folder that holds the modules")
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write")
    parser.add_argument("functions", nargs="+", metavar="module.path:function")
    args = parser.parse_args()
    functions = {name.replace(":", "."): {"parameters": parameters_in(args.root, name)} for name in args.functions}
    record = {"package": args.package, "version": args.version, "source": args.source, "functions": functions}
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def parameters_in(root: Path, name: str) -> list[dict[str, Any]]:
    """The parameters of ``module.path:function`` in the sources below ``root``."""
    module, _, qualified = name.partition(":")
    file = module_file(root, module)
    if file is None:
        raise SystemExit(f"{module} has no source file below {root}")
    found = {json.dumps(parameters(node)) for node in definitions(ast.parse(file.read_bytes()), qualified.split("."))}
    if len(found) != 1:
        raise SystemExit(f"{file} defines {qualified!r} with {len(found)} signatures, not with one")
    listed: list[dict[str, Any]] = json.loads(found.pop())
    return listed


def module_file(root: Path, module: str) -> Path | None:
    """The source file of a module, if there is one."""
    base = root.joinpath(*module.split("."))
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


def definitions(scope: ast.AST, path: list[str]) -> Iterator[Function]:
    """Every definition of a function; those below ``if``, ``try`` and ``with`` count, typing overloads do not."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, Function | ast.ClassDef):
            if node.name != path[0]:
                continue
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, path[1:]) if path[1:] else ()
            elif not path[1:] and not any(ast.unparse(mark).endswith("overload") for mark in node.decorator_list):
                yield node
        elif not isinstance(node, ast.expr | ast.Lambda):
            yield from definitions(node, path)


def parameters(function: Function) -> list[dict[str, Any]]:
    """Name, kind, default and whether it must be given, of each parameter in order."""
    of = function.args
    positional = [(arg, "POSITIONAL_ONLY") for arg in of.posonlyargs] + [
        (arg, "POSITIONAL_OR_KEYWORD") for arg in of.args
    ]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(of.defaults)) + list(of.defaults)
    listed = [_parameter(arg, kind, default) for (arg, kind), default in zip(positional, defaults, strict=True)]
    if of.vararg:
        listed.append(_parameter(of.vararg, "VAR_POSITIONAL", None))
    listed += [_parameter(a, "KEYWORD_ONLY", d) for a, d in zip(of.kwonlyargs, of.kw_defaults, strict=True)]
    if of.kwarg:
        listed.append(_parameter(of.kwarg, "VAR_KEYWORD", None))
    return listed


def _parameter(arg: ast.arg, kind: str, default: ast.expr | None) -> dict[str, Any]:
    text = None if default is None else _text(default)
    return {
        "name": arg.arg,
        "kind": kind,
        "default": text,
        "required": text is None and not kind.startswith("VAR_"),
    }


def _text(default: ast.expr) -> str:
    """A literal as its repr, so that 1e-1 and 0.1 are alike; anything else as it is written."""
    try:
        return repr(ast.literal_eval(default))
    except ValueError:
        return ast.unparse(default)


if __name__ == "__main__":
    main()
