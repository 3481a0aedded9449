"""What a switch "use flash attention" says of itself, as values: in one line, in English and in Chinese.

Reasons are a plan's own refusals, put into a sentence; nothing here guesses. Refuses languages other than these two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from heedful.errors import InvalidArgument
from heedful.refusal import Refusal

OFF = "off"
OWN = "its own"
# Nothing that is installed mends these, so no remedy that installs is told beside them.
_LASTING = frozenset({"device", "compute capability", "architecture"})
_INSTALLING = frozenset({"package", "download"})
_FIRST = ("package", "import", "probe", "guard", "device", "architecture", "compute capability", "dtype")
_SHOWN = 3  # sentences in one line; all of them are in ``causes``

# What refusals are about, in Chinese; a field that is not here stands as it is.
FIELDS_ZH: Mapping[str, str] = {
    "device": "设备", "architecture": "架构", "compute capability": "计算能力", "dtype": "数据类型",
    "head dim": "头维度", "head dim padding": "头维度填充", "value dim": "值维度", "layout": "布局",
    "leading sizes": "前导维度",
    "batch": "批大小", "kv heads": "KV 头数", "mask": "掩码", "packing": "打包", "mask mix": "掩码组合",
    "causal alignment": "因果对齐", "bias dtype": "偏置的数据类型", "bias gradient": "偏置的梯度", "empty rows": "空行",
    "scale": "缩放", "softcap": "软上限", "sinks": "注意力汇点", "dropout_p": "dropout", "gradient": "梯度",
    "deterministic gradient": "确定性梯度", "autocast": "自动混合精度", "window": "窗口", "options": "选项",
    "return_lse": "LSE",
}  # fmt: skip


@dataclass(frozen=True)
class Cause:
    """Why a backend that was wished for does not compute some layers: its refusals; or ``note``, what else is so."""

    backend: str
    refusals: tuple[Refusal, ...] = ()
    note: str = ""

    def sentences(self, language: str) -> list[str]:
        """One for each refusal, what has to be mended first at the beginning."""
        lasting = any(refusal.field in _LASTING for refusal in self.refusals)
        told = [one for one in self.refusals if not (lasting and one.field == "download")]
        ordered = sorted(told, key=lambda one: _FIRST.index(one.field) if one.field in _FIRST else len(_FIRST))
        sentences = [_sentence(one, self.backend, language, remedy=not lasting) for one in ordered]
        return [*sentences, *([self.note] if self.note else [])]


@dataclass(frozen=True)
class ComponentStatus:
    """One component of a pipeline; "" for a model by itself. ``calls``: attention calls that heedful computed there."""

    component: str
    active: str
    covered: int
    total: int
    calls: int


@dataclass(frozen=True)
class FlashStatus:
    """What the switch was asked for, what computes attention, and why it is not the same, if it is not.

    ``requested``: the flash backend's name, or "off". ``active``: the backends that computed the calls so far; before
    the first, those that would now, found by planning a plain call of each layer; "its own" where heedful has no part.
    ``ran`` says which of both it is. ``covered`` of ``total`` attention layers go to heedful. ``reason`` and ``text``
    are in ``language``. ``str`` is one line for a log.
    """

    requested: str
    active: str
    covered: int
    total: int
    calls: int
    layers: tuple[tuple[str, int], ...]  # backends, and how many of the covered layers each one has
    components: tuple[ComponentStatus, ...]
    causes: tuple[Cause, ...] = ()
    language: str = "en"
    again: Callable[[str], FlashStatus] | None = field(default=None, compare=False, repr=False)

    @property
    def ran(self) -> bool:
        """Whether ``active`` is what ran; False where it is what would run."""
        return self.calls > 0

    @property
    def flash(self) -> bool:
        """Whether flash computes at least one layer."""
        return any(name in self.requested.split(" > ") for name, _ in self.layers)

    @property
    def reason(self) -> str:
        """Why ``active`` is not what was requested; empty where it is."""
        every = [told for cause in self.causes for told in cause.sentences(self.language)]
        unique = list(dict.fromkeys(every))
        more = len(unique) - _SHOWN
        told = unique[:_SHOWN] + ([_say(self.language, "more", count=more)] if more > 0 else [])
        return _say(self.language, "joint").join(told)

    @property
    def text(self) -> str:
        """One line for a user's eyes."""
        line = _say(self.language, self._state(), requested=self.requested, reason=self.reason, shares=self._shares())
        alone = [f"{one.component or 'model'} {one.total}" for one in self.components if not one.covered]
        if alone and self.requested != OFF:
            line += _say(self.language, "alone", components=_say(self.language, "comma").join(alone))
        return line

    def translated(self, language: str) -> FlashStatus:
        """The same in the other language. Raises InvalidArgument."""
        return replace(self, language=language_of(language))

    def refreshed(self) -> FlashStatus:
        """What holds by now, such as after a run. Raises InvalidArgument where the pipeline is gone."""
        if self.again is None:
            raise InvalidArgument("pipeline", "one that is not known here", "call flash_status(pipeline)")
        return self.again(self.language)

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON has."""
        plain = ("requested", "active", "reason", "text", "covered", "total", "calls", "ran", "language")
        parts = [vars(part) for part in self.components]
        return {**{name: getattr(self, name) for name in plain}, "layers": dict(self.layers), "components": parts}

    def __str__(self) -> str:
        reason = f", reason={self.reason}" if self.reason else ""
        return f"requested={self.requested}, active={self.active}{reason}, covered={self.covered}/{self.total}"

    def _state(self) -> str:
        if self.requested == OFF:
            return "elsewhere" if self.covered else "off"
        kind = "on" if self.flash and not self.causes else "part" if self.flash else "not"
        return f"{kind} {'ran' if self.ran else 'will'}"

    def _shares(self) -> str:
        told = (_say(self.language, "share", name=name, count=count) for name, count in self.layers)
        return _say(self.language, "comma").join(told)


def status_of(
    requested: str, states: Iterable[tuple[str, tuple[str, ...], int, tuple[Cause, ...]]], language: str
) -> FlashStatus:
    """A status from (component, backends, calls, causes) of each layer; no backends where heedful has no part."""
    states = list(states)
    layers = Counter(name for _, names, _, _ in states for name in names)
    parts = []
    for component in dict.fromkeys(component for component, *_ in states):
        own = [(names, calls) for of, names, calls, _ in states if of == component]
        active = Counter(name for names, _ in own for name in names)
        covered = sum(bool(names) for names, _ in own)
        parts.append(ComponentStatus(component, _joined(active), covered, len(own), sum(calls for _, calls in own)))
    return FlashStatus(
        requested,
        _joined(layers),
        sum(part.covered for part in parts),
        len(states),
        sum(part.calls for part in parts),
        tuple(layers.most_common()),
        tuple(parts),
        tuple(dict.fromkeys(cause for *_, causes in states for cause in causes)),
        language,
    )


def language_of(language: object) -> str:
    """ "en" or "zh", from such as "zh-CN". Raises InvalidArgument."""
    word = str(language).lower().replace("_", "-").partition("-")[0]
    if not isinstance(language, str) or word not in _TEXTS:
        raise InvalidArgument("language", repr(language), f"give one of {', '.join(_TEXTS)}")
    return word


def _joined(counted: Counter[str]) -> str:
    return ", ".join(name for name, _ in counted.most_common()) or OWN


def _say(language: str, what: str, **values: Any) -> str:
    return _TEXTS[language][what].format(**values)


def _sentence(refusal: Refusal, backend: str, language: str, *, remedy: bool) -> str:
    """A refusal as a sentence that says who refuses."""
    kind, values = refusal.field, {"observed": refusal.observed, "required": refusal.required, "backend": backend}
    absent = kind == "package" and refusal.observed.endswith(" not installed")
    if absent:
        values["observed"] = refusal.observed.removesuffix(" not installed").replace("-", "_")
    texts = _TEXTS[language]
    values["field"] = FIELDS_ZH.get(kind, kind) if language == "zh" else kind
    told = texts.get("absent" if absent else f"of {kind}", texts["refusal"]).format(**values)
    mends = refusal.remedy and (remedy or kind not in _INSTALLING) and kind in {*_INSTALLING, "import", "dtype"}
    return told + texts["remedy"].format(remedy=refusal.remedy) if mends else told


_TEXTS: Mapping[str, Mapping[str, str]] = {
    "en": {
        "absent": "{observed} is not installed",
        "of package": "{observed} is installed, {backend} takes {required}",
        "of import": "{observed}",
        "of probe": "{backend} failed its trial: {observed}",
        "of guard": "{backend} gave wrong answers: {observed}",
        "of download": "its kernel on the Hub may not be downloaded",
        "refusal": "{field} is {observed}, {backend} takes {required}",
        "remedy": " ({remedy})",
        "joint": "; ",
        "comma": ", ",
        "more": "and {count} more reasons",
        "share": "{name} {count} layers",
        "alone": " Left alone: {components} layers.",
        "off": "Flash attention is off; every layer computes attention by its own code.",
        "elsewhere": "Flash attention is off by this switch; set_attention_backend has set: {shares}.",
        "on will": "Flash attention is on and will compute: {shares}.",
        "on ran": "Flash attention is on and computed: {shares}.",
        "part will": "Flash attention is on for a part: {shares}. Reason: {reason}.",
        "part ran": "Flash attention computed a part: {shares}. Reason: {reason}.",
        "not will": "Flash attention ({requested}) will not be used: {reason}. Instead: {shares}.",
        "not ran": "Flash attention ({requested}) was not used: {reason}. Instead: {shares}.",
    },
    "zh": {
        "absent": "未安装 {observed}",
        "of package": "已安装 {observed}，{backend} 需要 {required}",
        "of import": "{observed}",
        "of probe": "{backend} 试运行失败：{observed}",
        "of guard": "{backend} 给出过错误结果：{observed}",
        "of download": "不允许从 Hub 下载它的内核",
        "refusal": "{field}为 {observed}，{backend} 只支持 {required}",
        "remedy": "（{remedy}）",
        "joint": "；",
        "comma": "，",
        "more": "另有 {count} 条原因",
        "share": "{name} {count} 层",
        "alone": "未改动：{components} 层。",
        "off": "Flash 注意力已关闭；每一层都用自己的代码计算注意力。",
        "elsewhere": "此开关已关闭 Flash 注意力；set_attention_backend 另有设置：{shares}。",
        "on will": "Flash 注意力已开启，将计算：{shares}。",
        "on ran": "Flash 注意力已开启，实际计算：{shares}。",
        "part will": "Flash 注意力只对一部分开启：{shares}。原因：{reason}。",
        "part ran": "Flash 注意力只计算了一部分：{shares}。原因：{reason}。",
        "not will": "不会使用 Flash 注意力（{requested}）：{reason}。改用：{shares}。",
        "not ran": "没有使用 Flash 注意力（{requested}）：{reason}。改用：{shares}。",
    },
}
