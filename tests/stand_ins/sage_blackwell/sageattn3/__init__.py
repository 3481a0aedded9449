"""Stand-in for sageattn3 1.0.0, SageAttention 3 for consumer Blackwell GPUs: see ``api``."""

from sageattn3.api import sageattn3_blackwell

__all__ = ["sageattn3_blackwell"]
