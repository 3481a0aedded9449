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
from heedful.models import attention_report, reset_attention_backend, set_attention_backend
from heedful.policy import Policy, checkpoint_context
from heedful.problem import AttentionProblem
from heedful.refusal import Refusal
from heedful.report import AttentionReport, LayerReport
from heedful.select import Plan
from heedful.strategy import AttentionStrategy, Limits, Pin

__version__ = "0.1.0"
__all__ = [
    "AttentionDispatcher",
    "AttentionProblem",
    "AttentionReport",
    "AttentionStrategy",
    "AttentionStrategyFactory",
    "Bias",
    "Causal",
    "Dense",
    "Facts",
    "HeedfulError",
    "InvalidArgument",
    "KeyPadding",
    "LayerReport",
    "Limits",
    "Mask",
    "NothingCovered",
    "Pin",
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
    "attention_report",
    "checkpoint_context",
    "explain",
    "list_backends",
    "reset_attention_backend",
    "set_attention_backend",
]
