"""Reports of a model's layers and of the whole process: calls, share of the time, rewrites, and the guard's word."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import heedful
from heedful import Policy
from heedful.dispatch import default_dispatcher
from heedful.layer_report import AttentionReport, LayerReport


class Layer(nn.Module):
    """Attention of a sequence with itself."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x):
        x = self.project(x)
        return F.scaled_dot_product_attention(x, x, x)


@pytest.fixture
def process(monkeypatch):
    """The process's dispatcher with the guard on, which knows nothing yet; afterwards it is what it was."""
    default_dispatcher.forget_plans()
    for name, value in (("_experience", None), ("_made", None), ("_policy", Policy())):
        monkeypatch.setattr(default_dispatcher, name, value)
    yield default_dispatcher
    monkeypatch.undo()
    default_dispatcher.forget_plans()


@pytest.fixture
def model(process):
    made = nn.Sequential(Layer(), Layer()).eval()
    heedful.set_attention_backend(made, "auto")
    with torch.no_grad():
        for _ in range(4):
            made(torch.randn(1, 2, 16, 8))
    yield made
    heedful.reset_attention_backend(made)


def test_layers_have_their_calls_time_and_checks(model):
    report = heedful.attention_report(model)
    assert [(layer.path, layer.calls, layer.active, layer.lowerings) for layer in report] == [
        ("0", 4, "native", ()),
        ("1", 4, "native", ()),
    ]
    assert all(layer.seconds > 0 and layer.guard.startswith("right in ") for layer in report)
    head, line, _ = str(report).splitlines()
    assert head.split() == ["layers", "path", "module", "requested", "active", "calls", "time", "guard", "reason"]
    assert line.split()[:7] == ["2", "*", "Layer", "auto", "native", "4", "100%"]


def test_the_process_is_reported_by_layer_and_the_rest_beside_it(model):
    query = torch.randn(1, 2, 16, 8)
    heedful.attention(query, query, query)
    heedful.attention(query, query, query, is_causal=True, backend="reference")
    rows = {(row.layer, row.backend): row.calls for row in heedful.report()}
    assert rows == {("*", "native"): 8, ("", "native"): 1, ("", "reference"): 1}
    assert heedful.report().calls == 10
    assert math.isclose(sum(row.share for row in heedful.report()), 1.0)


def test_rewrites_are_told_of_each_layer(process):
    model = Layer().eval().half()
    heedful.set_attention_backend(model, "auto")
    with torch.no_grad():
        model(torch.randn(1, 4, 128, 8).half())
    (layer,) = heedful.attention_report(model)
    (row,) = heedful.report()
    assert (row.layer, row.calls, row.lowerings) == ("(the model)", 1, layer.lowerings)
    assert "upcast" in layer.lowerings
    heedful.reset_attention_backend(model)


def layer(path, **more):
    given = {"component": "", "module": "Layer", "requested": "auto", "active": "native", "reason": "backend"}
    return LayerReport(path=path, covered=True, **{**given, **more})


def test_columns_that_nobody_fills_are_not_printed():
    head = str(AttentionReport((layer("a"),))).splitlines()[0].split()
    assert head == ["layers", "path", "module", "requested", "active", "calls", "reason"]


def test_layers_with_other_rewrites_have_lines_of_their_own():
    report = AttentionReport((layer("a.0"), layer("a.1", lowerings=("upcast",)), layer("a.2")))
    lines = [line.split() for line in str(report).splitlines()]
    assert [line[:2] for line in lines[1:3]] == [["2", "a.*"], ["1", "a.1"]]
    assert "upcast" in lines[2]


def test_a_fault_of_any_layer_of_a_line_is_printed():
    """Layers that differ by number alone share a line; a wrong answer of the second one must not vanish in it."""
    report = AttentionReport((layer("a.0", guard="right in 3"), layer("a.1", guard="WRONG: NaN in query 3")))
    assert "WRONG: NaN in query 3" in str(report)


def test_shares_are_of_the_whole_time():
    report = AttentionReport((layer("a", seconds=0.3), layer("b", seconds=0.1), layer("c")))
    printed = str(report)
    assert "75%" in printed
    assert "25%" in printed
    assert "100%" not in printed
    assert report.to_dict()["layers"][0]["seconds"] == 0.3


def test_coverage_is_told_of_each_component_and_of_what_is_not_counted():
    rows = (
        layer("unet.0", component="unet"),
        layer("unet.1", component="unet", role="cross"),
        LayerReport("vae.0", "vae", "Layer", "keep", "its own", "exclude 'vae'", covered=False, role="vae"),
        LayerReport("vae.1", "vae", "Linear", "auto", "its own", "no softmax", covered=False, counted=False),
    )
    report = AttentionReport(rows)
    assert (report.covered, report.total, len(report)) == (2, 3, 4)
    assert report.components == {"unet": (2, 2), "vae": (0, 1)}
    told = "covered 2 of 3: unet 2 of 2, vae 0 of 1; beside them 1 that compute no softmax attention"
    assert str(report).splitlines()[-1] == report.coverage() == told
    data = report.to_dict()
    assert data["components"] == {"unet": {"covered": 2, "total": 2}, "vae": {"covered": 0, "total": 1}}
    assert [row["role"] for row in data["layers"]] == ["", "cross", "vae", ""]
    assert str(report).splitlines()[0].split()[:4] == ["layers", "path", "module", "role"]


def test_conflicts_are_rows_of_their_own():
    rows = (layer("a.0"), layer("a.1", conflict="replaced", reason="conflict: replaced"))
    report = AttentionReport(rows)
    assert report.conflicts == rows[1:]
    assert "conflict: replaced" in str(report).splitlines()[2]
