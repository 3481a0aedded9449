"""Every backend draws the same pictures; what cannot draw says why; the pipeline is left as it was."""

import numpy as np
import pytest
import torch

import heedful
from heedful.demo.compare import compare, runnable_backends
from heedful.demo.digits import NAMES, load_pipeline

STEPS = 5


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


def drawn_by(pipeline, backends, judge="reference"):
    def draw(tick):
        return pipeline(NAMES, seed=1, steps=STEPS, on_step=tick).numpy()

    ticks = []
    return compare(pipeline, draw, backends, judge, ticks.append), ticks


def test_all_exact_backends_draw_the_same(pipeline):
    names, _ = runnable_backends()
    drawn, ticks = drawn_by(pipeline, names)
    assert {each.backend for each in drawn} == set(names) >= {"auto", "native", "native_flash", "flex", "reference"}
    for each in drawn:
        assert each.refused == ""
        assert each.difference <= 1 / 255
        assert each.kernels == (("native",) if each.backend == "auto" else (each.backend,))
        assert each.coverage.split()[0] == each.coverage.split()[-1]
        assert each.seconds_per_step > 0
    assert len(ticks) == STEPS * len(names)


def test_a_backend_that_refuses_says_why(pipeline):
    (drawn,), _ = drawn_by(pipeline, ["native_cudnn"], judge="native")
    assert drawn.pictures is None
    assert "device is cpu, it takes cuda" in drawn.refused
    assert drawn.row()["refused"]


def test_a_judge_that_refuses_is_an_error(pipeline):
    with pytest.raises(heedful.Refused, match="native_cudnn refuses"):
        drawn_by(pipeline, ["native"], judge="native_cudnn")


def test_the_pipeline_is_left_as_it_was(pipeline):
    before = pipeline(NAMES, seed=1, steps=STEPS)
    drawn_by(pipeline, ["flex", "native_cudnn"], judge="native")
    assert torch.equal(before, pipeline(NAMES, seed=1, steps=STEPS))
    assert all("forward" not in vars(module) for module in pipeline.unet.modules())


def test_a_wrong_backend_is_seen(pipeline):
    class Zeros(heedful.AttentionStrategy):
        limits = heedful.Limits(masks=frozenset({"bias"}), empty_rows=frozenset({"output"}), scale=True)

        def compute_attention(self, query, key, value, **kwargs):
            return torch.zeros_like(query)

    heedful.AttentionStrategyFactory.register_strategy("zeros", Zeros)
    try:
        (drawn,), _ = drawn_by(pipeline, ["zeros"], judge="native")
    finally:
        heedful.AttentionStrategyFactory.unregister_strategy("zeros")
    assert drawn.difference > 1 / 255
    assert np.isfinite(drawn.pictures).all()
