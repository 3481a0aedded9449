"""The guides: their tables are those of the registry, their links lead somewhere, their Python is Python."""

import ast
import importlib.util
import re
import textwrap
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
GUIDES = sorted(
    path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")) if not path.name.startswith((".", "_"))
)
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")
BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


def generator():
    """docs/generate_backends.py as a module."""
    spec = importlib.util.spec_from_file_location("generate_backends", ROOT / "docs" / "generate_backends.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = generator()


def anchors(path):
    """The names that a guide's headings can be linked by, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TABLES.TABLES)
def test_the_table_of_backends_is_the_registrys(name):
    assert name not in TABLES.stale(), "python docs/generate_backends.py writes it anew"


def test_marks_that_are_missing_are_an_error():
    with pytest.raises(ValueError, match="marks are missing"):
        TABLES.renewed("no marks", "table")


@pytest.mark.parametrize("name", TABLES.strategies())
def test_every_backend_has_its_section(name):
    assert name in anchors(ROOT / "docs" / "backends.md")


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target, anchor in LINK.findall(path.read_text("utf-8")):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        found = path.parent / unquote(target) if target else path
        assert found.exists(), target
        if anchor and found.suffix == ".md":
            assert unquote(anchor[1:]) in anchors(found), f"{target}{anchor}"


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_in_guides_is_python(path):
    for indent, code in BLOCK.findall(path.read_text("utf-8")):
        ast.parse(textwrap.dedent(indent + code))


@pytest.mark.parametrize("english", [path for path in GUIDES if (path.parent / f"{path.stem}.zh.md").exists()])
def test_a_translation_has_the_same_code_and_links(english):
    chinese = english.with_suffix(".zh.md")
    one, other = (path.read_text("utf-8") for path in (english, chinese))

    def code(text):
        return [ast.dump(ast.parse(textwrap.dedent(indent + block))) for indent, block in BLOCK.findall(text)]

    def links(text):
        return sorted(target for target, _ in LINK.findall(text) if not target.startswith("README"))

    assert code(one) == code(other)
    assert links(one) == links(other)


def test_no_figure_is_still_to_be_measured():
    assert [
        path for path in sorted(ROOT.glob("**/*.md")) if ".venv" not in path.parts and "TODO" in path.read_text("utf-8")
    ] == []
