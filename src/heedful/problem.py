"""The problem: everything that decides which strategies can run and how fast. Frozen, hashable, without tensors.

Shapes: B batch, H heads, N kv heads, Q query length, K key length, D head dim, E value dim, T packed tokens.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from heedful.errors import InvalidArgument
from heedful.facts import DeviceFacts
from heedful.masks import NO_MASK, Mask, MaskFacts, facts_of

Layout = Literal["BHSD", "BSHD", "THD"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class AttentionProblem:
    """One attention call, without its tensors.

    ``dtype`` is the one computed in (after autocast); ``autocast`` says that inputs are cast to it first.
    ``broadcast`` says that the leading sizes of query, key and value differ and broadcast, as SDPA lets them.
    ``scale`` None means 1/sqrt(head_dim).
    """

    batch: int
    heads: int
    kv_heads: int
    query_length: int
    key_length: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    capability: tuple[int, int] | None = None
    architecture: str = ""
    layout: Layout = "BHSD"
    mask: MaskFacts = NO_MASK
    dropout_p: float = 0.0
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    needs_grad: bool = False
    needs_lse: bool = False
    deterministic: bool = False
    compiling: bool = False
    autocast: bool = False
    broadcast: bool = False
    max_error: float | None = None
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def is_empty(self) -> bool:
        """No element of an answer, or no key to attend to: nothing is left to compute."""
        answer = self.needs_lse or self.value_dim > 0
        return not answer or 0 in (self.batch, self.heads, self.query_length, self.key_length)

    @property
    def effective_scale(self) -> float:
        """What the scores are multiplied by."""
        return 1.0 / math.sqrt(self.head_dim) if self.scale is None else self.scale

    @property
    def may_hide_rows(self) -> bool:
        """Whether a query may exist that sees no key: its output is zero and its LSE is -inf."""
        return self.mask.may_hide_rows(self.query_length, self.key_length)

    def replace(self, **changes: Any) -> AttentionProblem:
        """The same problem with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; ``from_dict`` gives the equal problem back."""
        data = dataclasses.asdict(self)
        data["dtype"] = _dtype_name(self.dtype)
        data["mask"]["bias_dtype"] = _dtype_name(self.mask.bias_dtype)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AttentionProblem:
        """A problem out of the JSON data that ``to_dict`` gave.

        Raises InvalidArgument for a field of another type; LookupError, TypeError or ValueError for no such table.
        """
        mask = dict(data["mask"])
        mask["bias_dtype"] = _dtype_named(mask["bias_dtype"])
        mask["window"] = tuple(mask["window"]) if mask["window"] else None
        changes = {
            "dtype": _dtype_named(data["dtype"]),
            "mask": MaskFacts(**_checked(MaskFacts, mask)),
            "capability": tuple(data["capability"]) if data["capability"] else None,
            "options": _frozen(data["options"]),
        }
        return cls(**_checked(cls, {**data, **changes}))

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        dims = f"{self.head_dim}" if self.head_dim == self.value_dim else f"{self.head_dim}/{self.value_dim}"
        where = self.device + (f" {self.architecture}" if self.architecture else "")
        extras = [
            f"mask {self.mask}" if self.mask.kinds else "",
            f"dropout {self.dropout_p}" if self.dropout_p else "",
            f"scale {self.scale:.4g}" if self.scale is not None else "",
            f"softcap {self.softcap}" if self.softcap else "",
            f"max_error {self.max_error:g}" if self.max_error is not None else "",
            "sinks" if self.sinks else "",
            "with gradient" if self.needs_grad else "",
            "with LSE" if self.needs_lse else "",
            "deterministic" if self.deterministic else "",
            "compiled" if self.compiling else "",
            "autocast" if self.autocast else "",
            *(f"{name}={value!r}" for name, value in self.options),
        ]
        shape = f"B{self.batch} H{heads} Q{self.query_length} K{self.key_length} D{dims}"
        return ", ".join([f"{shape} {_dtype_name(self.dtype)} {self.layout} on {where}", *filter(None, extras)])


def sizes_of(
    query: Shape, key: Shape, value: Shape, *, layout: str, enable_gqa: bool
) -> tuple[dict[str, Any], Shape, bool]:
    """Check the three shapes; give the problem's sizes, the leading shape of the answer, and whether they broadcast.

    Raises InvalidArgument naming the tensor whose shape does not fit.
    """
    if layout not in LAYOUTS:
        raise InvalidArgument("layout", repr(layout), f"give one of {', '.join(LAYOUTS)}")
    for name, shape in (("query", query), ("key", key), ("value", value)):
        _check_rank(name, shape, layout)
    if layout == "BSHD":
        query, key, value = ((*s[:1], s[2], s[1], s[3]) for s in (query, key, value))
    elif layout == "THD":
        query, key, value = ((1, s[1], s[0], s[2]) for s in (query, key, value))
    if key[-1] != query[-1]:
        raise InvalidArgument("key", f"head dim {key[-1]}", f"query has {query[-1]}; both must be equal")
    if query[-1] == 0:
        raise InvalidArgument("query", "head dim 0", "give at least one feature")
    if key[-2] != value[-2]:
        raise InvalidArgument("value", f"length {value[-2]}", f"key has {key[-2]}; both must be equal")
    lead, kv_heads, broadcast = _leading(query, key, value, enable_gqa)
    return (
        {
            "batch": math.prod(lead[:-1]),
            "heads": lead[-1] if lead else 1,
            "kv_heads": kv_heads,
            "query_length": query[-2],
            "key_length": key[-2],
            "head_dim": query[-1],
            "value_dim": value[-1],
        },
        lead,
        broadcast,
    )


def _check_rank(name: str, shape: Shape, layout: str) -> None:
    wanted = {"BSHD": 4, "THD": 3}.get(layout)
    if len(shape) == wanted or (wanted is None and len(shape) >= 2):
        return
    need = f"{wanted} dimensions" if wanted else "at least 2 dimensions (…, length, head dim)"
    raise InvalidArgument(name, f"shape {tuple(shape)}", f"layout {layout} needs {need}")


def _leading(query: Shape, key: Shape, value: Shape, enable_gqa: bool) -> tuple[Shape, int, bool]:
    """The broadcast leading shape (…, H), the kv heads, and whether anything has to be expanded to reach it."""
    leads = [shape[:-2] for shape in (query, key, value)]
    if enable_gqa and all(leads):
        heads, key_heads, value_heads = (lead[-1] for lead in leads)
        if key_heads != value_heads:
            raise InvalidArgument("value", f"{value_heads} heads", f"key has {key_heads}; both must be equal")
        if key_heads == 0 or heads % key_heads:
            raise InvalidArgument("key", f"{key_heads} heads", f"they must divide query's {heads} (enable_gqa=True)")
        outer = _broadcast([lead[:-1] for lead in leads], leads)
        uneven = any(len(lead) != 2 or lead[:-1] != outer for lead in leads)
        return (*outer, heads), heads if uneven else key_heads, uneven
    lead = _broadcast(leads, leads)
    uneven = len(lead) != 2 or any(one != lead for one in leads)
    return lead, lead[-1] if lead else 1, uneven


def _broadcast(parts: list[Shape], leads: list[Shape]) -> Shape:
    """``torch.broadcast_shapes`` in plain integers, with an error that names the argument."""
    rank = max(map(len, parts))
    padded = [(1,) * (rank - len(part)) + tuple(part) for part in parts]
    sizes = []
    for column in zip(*padded, strict=True):
        wanted = {size for size in column if size != 1}
        if len(wanted) > 1:
            hint = "pass enable_gqa=True if key and value have fewer heads; else equal sizes, or 1"
            raise InvalidArgument(
                "key, value", f"leading sizes {leads[1]}, {leads[2]}", f"query has {leads[0]}: {hint}"
            )
        sizes.append(wanted.pop() if wanted else 1)
    return tuple(sizes)


def check_mask(mask: Mask | None, lead: Shape, query_length: int, key_length: int, layout: str) -> None:
    """Every tensor of a mask must fit (…, H, Q, K); raises InvalidArgument with the remedy."""
    if layout == "THD" and (mask is None or mask.varlen is None):
        raise InvalidArgument("attn_mask", "no Varlen", "layout='THD' needs attn_mask=Varlen(cu_seqlens_q, …)")
    if mask is None:
        return
    full = (*lead, query_length, key_length)
    for tensor in (mask.dense, mask.bias):
        if tensor is not None:
            check_mask_shape(tuple(tensor.shape), full)
    batch = math.prod(lead[:-1])
    if mask.padding is not None and mask.padding.shape not in {(batch, key_length), (1, key_length)}:
        shape = tuple(mask.padding.shape)
        raise InvalidArgument("attn_mask", f"KeyPadding of shape {shape}", f"give ({batch}, {key_length})")
    if mask.rows is not None and mask.rows.shape not in {(batch, query_length), (1, query_length)}:
        came = f"KeyPadding with queries of shape {tuple(mask.rows.shape)}"
        raise InvalidArgument("attn_mask", came, f"give ({batch}, {query_length})")
    if mask.block is not None:
        check_block_shape(mask.block, (batch, lead[-1] if lead else 1, query_length, key_length))
    if mask.varlen is not None and getattr(mask.varlen, "lengths", None) is not None:
        for name, lengths, total in zip("qk", mask.varlen.lengths or (), (query_length, key_length), strict=True):
            if sum(lengths) > total:
                raise InvalidArgument(f"cu_seqlens_{name}", f"a total of {sum(lengths)}", f"there are {total} tokens")
    if mask.varlen is not None and batch != 1:
        raise InvalidArgument("attn_mask", f"Varlen with batch {batch}", "pack the sequences: layout='THD', or batch 1")


def check_block_shape(block: Any, full: Shape) -> None:
    """A ``BlockMask`` must be for (B, H, Q, K); while dynamo traces, a stand-in without a shape passes."""
    shape = tuple(getattr(block, "shape", full))
    if len(shape) == 4 and shape[0] in (1, full[0]) and shape[1] in (1, full[1]) and shape[2:] == full[2:]:
        return
    raise InvalidArgument("attn_mask", f"BlockMask of shape {shape}", f"give {full}; the first two sizes may be 1")


def check_mask_shape(shape: Shape, full: Shape) -> None:
    """A dense mask or a bias must broadcast to the scores' shape (…, H, Q, K)."""
    fits = len(shape) <= max(4, len(full)) and all(
        have in (1, want) for have, want in zip(shape[::-1], (1, 1, *full)[::-1], strict=False)
    )
    if not fits:
        raise InvalidArgument(
            "attn_mask",
            f"shape {shape}",
            f"it must broadcast to {full}, (…, heads, queries, keys); for a (batch, keys) padding mask use KeyPadding",
        )


def problem_for_shapes(
    query: Shape,
    key: Shape,
    value: Shape,
    *,
    dtype: torch.dtype,
    device: DeviceFacts,
    mask: Mask | None = None,
    layout: str = "BHSD",
    enable_gqa: bool = False,
    **fields: Any,
) -> AttentionProblem:
    """The problem of three shapes; ``fields`` are fields of AttentionProblem. Raises InvalidArgument."""
    sizes, lead, broadcast = sizes_of(query, key, value, layout=layout, enable_gqa=enable_gqa)
    check_mask(mask, lead, sizes["query_length"], sizes["key_length"], layout)
    return AttentionProblem(
        **sizes,
        dtype=dtype,
        device=device.type,
        capability=device.capability,
        architecture=device.architecture,
        layout=layout,  # type: ignore[arg-type]
        mask=facts_of(mask, sizes["query_length"], sizes["key_length"]),
        broadcast=broadcast,
        **fields,
    )


def _checked(kind: type, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass, each of its type; raises InvalidArgument for another one. Numbers are not negative."""
    hints = get_type_hints(kind)
    for name, value in fields.items():
        negative = type(value) is int and value < 0
        if name not in hints or negative or not _fits(value, hints[name]):
            wanted = getattr(hints.get(name), "__name__", None) or str(hints.get(name, "no such field"))
            raise InvalidArgument(name, repr(value), f"give {wanted}")
    return fields


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as dataclasses of problems have them."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if parts:  # a union
        return any(_fits(value, part) for part in parts)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return hint is Any or (type(value) is hint if hint in (int, bool, str) else isinstance(value, hint))


def _frozen(value: Any) -> Any:
    """JSON's lists as tuples, which can be hashed."""
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _dtype_named(name: str | None) -> torch.dtype | None:
    dtype = None if name is None else getattr(torch, name, None)
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InvalidArgument("dtype", repr(name), "give the name of a floating dtype of torch, such as 'bfloat16'")
    return dtype
