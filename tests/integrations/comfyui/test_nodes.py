"""The node pack, loaded as ComfyUI loads one, with heedful and without."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui_contract import KEY, PACK, Model, loaded

import heedful
from heedful.integrations.comfyui import AttentionOverride

NODES = {
    "HeedfulAttentionBackend": "Attention Backend",
    "HeedfulAttentionDoctor": "Attention Doctor",
    "HeedfulAttentionReport": "Attention Report",
}
FLOW = json.loads((PACK / "example_workflows" / "attention_backend.json").read_text("utf-8"))
# Sockets of ComfyUI's own nodes that the example uses.
OWN = {
    "CheckpointLoaderSimple", "CLIPTextEncode", "EmptyLatentImage", "KSampler", "VAEDecode", "SaveImage", "PreviewAny",
    "Note",
}  # fmt: skip


@pytest.fixture
def pack() -> Iterator[ModuleType]:
    with loaded() as module:
        yield module


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))


def nodes_of(pack: ModuleType) -> Any:
    return sys.modules[f"{pack.__name__}.nodes"]


@pytest.mark.parametrize("name", [None, str(PACK).replace(".", "_x_"), "/ComfyUI v1.2/custom_nodes/heedful.git"])
def test_it_loads_under_the_names_that_comfyui_gives(name: str | None) -> None:
    with loaded(name=name) as pack:
        assert pack.NODE_DISPLAY_NAME_MAPPINGS == NODES
        assert set(pack.NODE_CLASS_MAPPINGS) == set(NODES)


def test_each_node_keeps_the_contract(pack: ModuleType) -> None:
    for node in pack.NODE_CLASS_MAPPINGS.values():
        sockets = node.INPUT_TYPES()
        assert set(sockets) <= {"required", "optional", "hidden"}
        assert all(isinstance(socket, tuple) for part in sockets.values() for socket in part.values())
        assert callable(getattr(node, node.FUNCTION))
        assert node.CATEGORY == "heedful"
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        json.dumps(sockets)


def test_the_backend_node(pack: ModuleType, x: torch.Tensor) -> None:
    node = pack.NODE_CLASS_MAPPINGS["HeedfulAttentionBackend"]
    sockets = node.INPUT_TYPES()
    assert sockets["required"]["model"] == ("MODEL",)
    assert {"auto", "flash", "native", "disabled"} <= set(sockets["required"]["backend"][0])
    assert sorted(sockets["required"]["fallback"][0]) == ["silent", "strict", "warn"]
    model = Model()
    made, report = node().apply(model, "native", "strict", "*.cross = reference")
    assert model.model_options == {"transformer_options": {}}
    assert isinstance(made.model_options["transformer_options"][KEY], AttentionOverride)
    assert report.startswith("heedful: backend native, fallback strict, rules *.cross = reference")
    made.attend(x, x, x, 2)
    made.attend(x, x[:, :3], x[:, :3], 2)
    told = pack.NODE_CLASS_MAPPINGS["HeedfulAttentionReport"]().tell(made, latent := {"samples": x})
    assert told["result"][0] is latent
    assert told["ui"]["text"] == [told["result"][1]]
    assert "1      model.self   native" in told["result"][1]
    assert "1      model.cross  reference" in told["result"][1]
    again, _ = node().apply(made, "disabled", "warn")
    assert again.model_options == model.model_options


def test_errors_of_heedful_reach_the_user(pack: ModuleType) -> None:
    with pytest.raises(heedful.UnknownBackend, match="flush"):
        pack.NODE_CLASS_MAPPINGS["HeedfulAttentionBackend"]().apply(Model(), "flush", "silent")


def test_the_doctor_tells_every_backend_or_what_the_doctor_of_heedful_says(
    pack: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = pack.NODE_CLASS_MAPPINGS["HeedfulAttentionDoctor"]
    monkeypatch.setitem(sys.modules, "heedful.doctor", None)  # cannot be imported
    report = node().examine()["result"][0]
    for name in ("native", "flash", "sage"):
        assert name in report
    monkeypatch.setitem(sys.modules, "heedful.doctor", SimpleNamespace(examine=lambda: ["a page"]))
    assert node().examine() == {"ui": {"text": ["['a page']"]}, "result": ("['a page']",)}


def test_reports_are_made_anew_each_time(pack: ModuleType) -> None:
    nodes = pack.NODE_CLASS_MAPPINGS
    assert math.isnan(nodes["HeedfulAttentionDoctor"].IS_CHANGED())
    assert math.isnan(nodes["HeedfulAttentionReport"].IS_CHANGED(model=1, latent=2))
    assert not hasattr(nodes["HeedfulAttentionBackend"], "IS_CHANGED")


def test_the_names_for_when_heedful_is_absent_are_heedfuls(pack: ModuleType) -> None:
    names = nodes_of(pack).NAMES
    assert set(names[1:-2]) < set(heedful.AttentionStrategyFactory(plugins=False).strategies())
    assert (names[0], names[-2:]) == ("auto", ["keep", "disabled"])


ABSENT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location({name!r}, {file!r})
pack = importlib.util.module_from_spec(spec)
sys.modules[{name!r}] = pack
spec.loader.exec_module(pack)
assert not {{"torch", "heedful"}} & set(sys.modules)
nodes = pack.NODE_CLASS_MAPPINGS
backend = nodes["HeedfulAttentionBackend"]
assert "flash" in backend.INPUT_TYPES()["required"]["backend"][0]
model = object()
same, text = backend().apply(model, "flash", "warn")
assert same is model
print(text)
print(nodes["HeedfulAttentionDoctor"]().examine()["result"][0])
latent = object()
told = nodes["HeedfulAttentionReport"]().tell(model, latent)
assert told["result"][0] is latent
print(told["result"][1])
try:
    backend().apply(model, "flash", "strict")
except RuntimeError as error:
    print("strict:", error)
"""


def test_without_heedful_it_loads_and_its_nodes_say_what_to_do() -> None:
    script = ABSENT.format(name=str(PACK), file=str(PACK / "__init__.py"))
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("The model is unchanged: heedful cannot be used (No module named 'heedful')")
    assert lines[3].startswith("strict: heedful cannot be used")
    for line in lines:
        assert f'Install it with: "{sys.executable}" "{PACK / "install.py"}", then restart ComfyUI.' in line


def test_its_pyproject_asks_for_nothing_that_could_replace_torch() -> None:
    project = (PACK / "pyproject.toml").read_text("utf-8")  # Python 3.10 has no tomllib
    assert re.findall(r"^dependencies = (.*)$", project, re.MULTILINE) == ["[]"]
    assert not (PACK / "requirements.txt").exists()
    assert re.findall(r"^(\w+) = ", project.partition("[tool.comfy]\n")[2], re.MULTILINE) == [
        "PublisherId",
        "DisplayName",
        "Icon",
    ]
    assert f'version = "{heedful.__version__}"' in project


# The example


def by_id() -> dict[int, dict[str, Any]]:
    return {node["id"]: node for node in FLOW["nodes"]}


def test_the_example_uses_all_nodes_and_only_known_ones() -> None:
    assert {node["type"] for node in FLOW["nodes"]} == OWN | set(NODES)


def test_the_links_of_the_example_join_sockets_of_one_type() -> None:
    nodes = by_id()
    for link, source, out, target, place, kind in FLOW["links"]:
        given, taken = nodes[source]["outputs"][out], nodes[target]["inputs"][place]
        assert link in given["links"]
        assert taken["link"] == link
        assert given["type"] == kind
        assert taken["type"] in (kind, "*")
    assert FLOW["last_link_id"] == len(FLOW["links"])
    assert FLOW["last_node_id"] == max(nodes)


def test_the_nodes_of_the_example_are_as_the_pack_has_them(pack: ModuleType) -> None:
    for node in FLOW["nodes"]:
        if node["type"] not in NODES:
            continue
        known = pack.NODE_CLASS_MAPPINGS[node["type"]]
        sockets = {**known.INPUT_TYPES()["required"], **known.INPUT_TYPES().get("optional", {})}
        widgets = {name: socket for name, socket in sockets.items() if isinstance(socket[0], list) or len(socket) > 1}
        assert [(one["name"], one["type"]) for one in node["outputs"]] == [
            *zip(known.RETURN_NAMES, known.RETURN_TYPES, strict=True)
        ]
        assert {one["name"]: one["type"] for one in node["inputs"]} == {
            name: socket[0] for name, socket in sockets.items() if name not in widgets
        }
        assert len(node["widgets_values"]) == len(widgets)
        for value, (kind, *_) in zip(node["widgets_values"], widgets.values(), strict=True):
            assert value in kind if isinstance(kind, list) else isinstance(value, str)


def test_the_two_readmes_say_the_same() -> None:
    english, chinese = ((PACK / name).read_text("utf-8") for name in ("README.md", "README.zh.md"))
    for word in ("`disabled`", "`strict`", "`warn`", "`silent`", "`keep`", "--no-deps", "install.py", "CLIP"):
        assert word in english
        assert word in chinese
