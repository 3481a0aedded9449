"""One call, every attention kernel, never silently wrong, and it can say why.

import heedful

out = heedful.attention(query, key, value, attn_mask=mask)
print(heedful.explain(query, key, value, attn_mask=mask))
"""

from heedful.dispatch import AttentionDispatcher, attention, attention_backend, explain, list_backends
from heedful.errors import (
    HeedfulError,
    InvalidArgument,
    NothingCovered,
    Refused,
    RegistrationError,
    UnknownBackend,
)
from heedful.factory import AttentionStrategyFactory
from heedful.facts import Facts
from heedful.masks import Bias, Causal, Dense, KeyPadding, Mask, SlidingWindow, Varlen
from heedful.policy import Policy
from heedful.problem import AttentionProblem
from heedful.select import Plan
from heedful.strategy import AttentionStrategy, Limits, Refusal

__version__ = "0.1.0"
__all__ = [
    "AttentionDispatcher",
    "AttentionProblem",
    "AttentionStrategy",
    "AttentionStrategyFactory",
    "Bias",
    "Causal",
    "Dense",
    "Facts",
    "HeedfulError",
    "InvalidArgument",
    "KeyPadding",
    "Limits",
    "Mask",
    "NothingCovered",
    "Plan",
    "Policy",
    "Refusal",
    "Refused",
    "RegistrationError",
    "SlidingWindow",
    "UnknownBackend",
    "Varlen",
    "attention",
    "attention_backend",
    "explain",
    "list_backends",
]
