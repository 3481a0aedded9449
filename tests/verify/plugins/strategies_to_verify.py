"""Strategies that are right, wrong, or end their process."""

import os
import time
from pathlib import Path

from heedful.strategies.reference import ReferenceAttentionStrategy


class Fine(ReferenceAttentionStrategy):
    """The reference, by another name."""

    name = "fine"


class Deaf(ReferenceAttentionStrategy):
    """Ignores scale."""

    name = "deaf"

    def compute_attention(self, query, key, value, *, scale=None, **kwargs):
        return super().compute_attention(query, key, value, **kwargs)


class Aborts(ReferenceAttentionStrategy):
    """Ends its process at a head dim of 40."""

    name = "aborts"

    def compute_attention(self, query, key, value, **kwargs):
        if query.shape[-1] == 40:
            print("kernel: illegal instruction", flush=True)
            os.abort()
        return super().compute_attention(query, key, value, **kwargs)


class Hangs(ReferenceAttentionStrategy):
    """Never returns at a head dim of 40."""

    name = "hangs"

    def compute_attention(self, query, key, value, **kwargs):
        while query.shape[-1] == 40:
            Path(os.environ.get("HANGING", os.devnull)).touch()
            time.sleep(60)
        return super().compute_attention(query, key, value, **kwargs)


class Impostor(ReferenceAttentionStrategy):
    """Has the name of one of heedful's own."""

    name = "native"


class Unfinished(ReferenceAttentionStrategy.__bases__[0]):
    """Computes nothing."""


def no_strategy():
    """Is a function."""
