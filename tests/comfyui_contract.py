"""Stubs of ComfyUI, written from its contract alone: a model that can be cloned, and attention that asks for overrides.

No line of ComfyUI's is in here.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

PACK = Path(__file__).parent.parent / "integrations" / "comfyui"
KEY = "optimized_attention_override"


class Model:
    """What a MODEL socket carries. Clones copy its options' ``dicts``, or ``all`` that lies in them, or share them."""

    def __init__(self, options: dict[str, Any] | None = None, copies: str = "dicts") -> None:
        self.model_options = {"transformer_options": {}} if options is None else options
        self.copies = copies

    def clone(self) -> Model:
        options = self.model_options
        if self.copies == "all":
            options = copy.deepcopy(options)
        elif self.copies == "dicts":
            options = {key: dict(each) if isinstance(each, dict) else each for key, each in options.items()}
        return Model(options, self.copies)

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """One attention call of the diffusion model."""
        options = {**self.model_options["transformer_options"], **kwargs.pop("transformer_options", {})}
        kwargs = {**kwargs, "transformer_options": options}
        if KEY in options:
            out: Tensor = options[KEY](own_attention, *args, **kwargs)
            return out
        return own_attention(*args, **kwargs)


def own_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Attention by the formula in float64: heads apart or not on either side, masks without a head dim."""
    own_calls.append(kwargs)
    dtype = q.dtype
    if not skip_reshape:
        q, k, v = (each.reshape(*each.shape[:2], heads, -1).permute(0, 2, 1, 3) for each in (q, k, v))
    q, k, v = (each.double() for each in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(groups, 1) for each in (k, v))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * (kwargs.get("scale") or q.shape[-1] ** -0.5)
    if mask is not None:
        whole = {2: lambda m: m[None, None], 3: lambda m: m[:, None], 4: lambda m: m}[mask.dim()](mask)
        scores = torch.where(whole, scores, -torch.inf) if whole.dtype == torch.bool else scores + whole.double()
    out = torch.einsum("bhqk,bhkd->bhqd", torch.softmax(scores, -1), v).to(dtype)
    return out if skip_output_reshape else out.permute(0, 2, 1, 3).reshape(out.shape[0], out.shape[2], -1)


own_calls: list[dict[str, Any]] = []  # the other keywords of each call that came to ``own_attention``


@contextmanager
def loaded(folder: Path = PACK, name: str | None = None) -> Iterator[ModuleType]:
    """A node pack imported as ComfyUI does: its folder's ``__init__.py``, under a name that is made of its path."""
    name = str(folder) if name is None else name
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for each in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
            del sys.modules[each]
