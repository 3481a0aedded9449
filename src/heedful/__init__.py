"""One call, every attention kernel, never silently wrong, and it can say why.

import heedful

out = heedful.attention(query, key, value, attn_mask=mask)
print(heedful.explain(query, key, value, attn_mask=mask))
"""

from heedful.dispatch import (
    AttentionDispatcher,
    attention,
    attention_backend,
    explain,
    freeze,
    list_backends,
    lock,
    thaw,
    use_lock,
)
from heedful.errors import (
    HeedfulError,
    InvalidArgument,
    LockBroken,
    NothingCovered,
    Refused,
    RegistrationError,
    UnknownBackend,
    WrongAnswer,
)
from heedful.factory import AttentionStrategyFactory
from heedful.facts import Facts
from heedful.layer_report import AttentionReport, LayerReport
from heedful.masks import Bias, Causal, Dense, KeyPadding, Mask, SlidingWindow, Varlen
from heedful.models import attention_report, report, reset_attention_backend, set_attention_backend
from heedful.policy import Policy, checkpoint_context
from heedful.problem import AttentionProblem
from heedful.refusal import Refusal
from heedful.run_report import RunReport
from heedful.sdpa import patch_sdpa
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
    "LockBroken",
    "Mask",
    "NothingCovered",
    "Pin",
    "Plan",
    "Policy",
    "Refusal",
    "Refused",
    "RegistrationError",
    "RunReport",
    "SlidingWindow",
    "UnknownBackend",
    "Varlen",
    "WrongAnswer",
    "attention",
    "attention_backend",
    "attention_report",
    "checkpoint_context",
    "explain",
    "freeze",
    "list_backends",
    "lock",
    "patch_sdpa",
    "report",
    "reset_attention_backend",
    "set_attention_backend",
    "thaw",
    "use_lock",
]
