"""``heedful replay``, as a user types it."""

import json

import pytest
import torch
from typer.testing import CliRunner

import heedful
from heedful.bundle import write_bundle
from heedful.call import problem_of_call
from heedful.cli import app

run = CliRunner(env={"NO_COLOR": "1", "FORCE_COLOR": None, "COLUMNS": "140"}).invoke


@pytest.fixture
def written(tmp_path):
    def write(strategy="native", **call):
        query, key, value = (
            torch.randn(1, 2, 30, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)
        )
        return str(
            write_bundle(
                tmp_path,
                problem=problem_of_call(query, key, value, **call),
                call=call,
                query=query,
                key=key,
                value=value,
                mask=None,
                strategy=strategy,
                version="0.1.0",
                steps=(),
                fault="the output is not finite in query 3 of batch 0, head 1",
                machine={"torch": "2.6.0", "gpu": "[an unusual] one"},
            )
        )

    return write


def test_a_backend_that_is_right_here(written):
    answer = run(app, ["replay", written(is_causal=True)])
    assert answer.exit_code == 0, answer.output
    for words in (
        "B1 H2 Q30 K30 D16 float32 BHSD on cpu, mask causal top_left",
        "is_causal=True",
        "recorded  native, version 0.1.0",
        "torch 2.6.0, gpu [an unusual] one",
        "fault     the output is not finite in query 3 of batch 0, head 1",
        "native is right here",
    ):
        assert words in answer.stdout
    rows = [line.split() for line in answer.stdout.splitlines()]
    assert [row[:2] for row in rows if row and row[0] in {"native", "reference"} and row[1] != "is"] == [
        ["native", "right"],
        ["reference", "right"],
    ]


def test_a_fault_that_is_here_too(written, monkeypatch):
    native = type(heedful.AttentionStrategyFactory.create_strategy("native"))
    monkeypatch.setattr(native, "compute_attention", lambda self, query, key, value, **call: value)
    path = written()
    answer = run(app, ["replay", path])
    assert answer.exit_code == 1
    assert "WRONG" in answer.stdout
    assert "the output is off by" in answer.stdout
    assert "the fault of native is here, too" in answer.stdout
    data = json.loads(run(app, ["replay", path, "--json"]).stdout)
    assert data["outcome"] == "wrong"
    assert [one["answer"] for one in data["replays"]] == ["wrong", "right"]
    assert data["replays"][0]["error"] > data["replays"][0]["allowed"] > 0
    monkeypatch.setattr(native, "compute_attention", lambda self, query, key, value, **call: value * float("nan"))
    answer = run(app, ["replay", path, "--json"])
    assert answer.exit_code == 1
    assert json.loads(answer.stdout)["replays"][0]["error"] is None


def test_a_backend_that_is_not_here(written):
    answer = run(app, ["replay", written("flash")])
    assert answer.exit_code == 3
    assert "device is cpu, it takes cuda" in answer.stdout
    assert "flash does not take this call here" in answer.stdout
    assert "native" in answer.stdout
    answer = run(app, ["replay", written("some_plugin"), "--json"])
    assert answer.exit_code == 3
    assert "no backend is called 'some_plugin'" in json.loads(answer.stdout)["replays"][0]["refused"]


def test_only_the_named_backends_beside_the_recorded_one(written):
    answer = run(app, ["replay", written(), "--backend", "native_math", "--backend", "native", "--json"])
    data = json.loads(answer.stdout)
    assert [one["backend"] for one in data["replays"]] == ["native", "native_math"]
    assert data["problem"]["query_length"] == 30
    assert data["recorded"]["strategy"] == "native"


def test_a_file_that_is_none(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"no")
    for name in (path, tmp_path / "nowhere"):
        answer = run(app, ["replay", str(name)])
        assert answer.exit_code == 2
        assert "Invalid value for FILE" in answer.stderr
