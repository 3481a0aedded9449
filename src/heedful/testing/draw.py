"""Samples for Hypothesis to draw: shapes, dtypes, layouts, strides, masks and arguments in any combination."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from heedful.testing.parts import Band, Bool, Float, Padding, Part
from heedful.testing.samples import Sample
from heedful.testing.table import AXES, DTYPES

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

_STRIDES = ("contiguous", "transposed", "features", "sliced", "offset", "chunk", "expanded")


def drawn_samples() -> SearchStrategy[Sample]:
    """A Hypothesis strategy that draws samples; with ``sample.aspects`` of one aspect each. Needs ``hypothesis``."""
    from hypothesis import strategies as st

    @st.composite
    def sample(draw: DrawFn) -> Sample:
        heads, kv_heads = draw(st.sampled_from([(1, None), (2, None), (3, None), (4, 2), (4, 1), (6, 3)]))
        sizes = st.integers(1, 20)
        return Sample(
            lead=(draw(st.integers(1, 3)), heads),
            kv_heads=kv_heads,
            query_length=draw(sizes),
            key_length=draw(sizes),
            head_dim=draw(st.sampled_from([1, 3, 8, 16, 40, 72])),
            value_dim=draw(st.sampled_from([None, None, 8, 20])),
            dtype=draw(st.sampled_from(DTYPES)),
            layout=draw(st.sampled_from(["BHSD", "BSHD"])),
            strides=draw(st.sampled_from(_STRIDES)),
            mask=draw(st.sampled_from([(), *[()] * 2]) | st.lists(_parts(), min_size=1, max_size=2).map(_compatible)),
            call=draw(_calls()),
            aspects=(draw(st.sampled_from(["forward", "lse", "gradient", "both", "garbage"])),),
        )

    return sample()


def _parts() -> SearchStrategy[Part]:
    from hypothesis import strategies as st

    axes, flags = st.sampled_from(AXES), st.booleans()
    dtypes = st.sampled_from([None, torch.float32, torch.float64])
    hidden = st.sampled_from([0.0, 0.4])
    return st.one_of(
        st.builds(Bool, axes=axes, empty_row=flags, strides=st.sampled_from(_STRIDES)),
        st.builds(Float, axes=axes, dtype=dtypes, hidden=hidden, full_row=flags, needs_grad=flags),
        st.builds(Padding, kind=st.sampled_from(["right", "left", "interior", "none", "row"])),
        st.builds(Band, left=st.none() | st.integers(0, 9), right=st.integers(1, 9), alignment=_alignments()),
    )


def _compatible(parts: list[Part]) -> tuple[Part, ...]:
    """Two bands of different alignment are no one mask: the first one stays."""
    bands = [part for part in parts if isinstance(part, Band)]
    return tuple(part for part in parts if part not in bands[1:])


def _calls() -> SearchStrategy[dict[str, Any]]:
    from hypothesis import strategies as st

    words = {
        "scale": st.sampled_from([0.0, -0.3, 0.2, 1.0]),
        "softcap": st.sampled_from([1.0, 5.0]),
        "is_causal": st.just(True),
    }
    return st.fixed_dictionaries({}, optional=words)


def _alignments() -> SearchStrategy[str]:
    from hypothesis import strategies as st

    return st.sampled_from(["top_left", "bottom_right"])
