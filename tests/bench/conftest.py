"""Small works, so that a run of all of it takes a second."""

import pytest
import torch

from heedful.bench.work import Work
from heedful.cases import Case


@pytest.fixture
def small():
    """``small("padded")``: a case of its own sizes under that mask."""

    def make(mask=None, dtype=torch.float32, **changes):
        sizes = {"batch": 2, "heads": 4, "query_length": 70, "key_length": 40, "head_dim": 16, **changes}
        return Work.of(Case(name="small", model="none", source="here", **sizes), mask, dtype)

    return make
