"""Limits, each of which has an effect; the base class that derives refusals from them."""

import dataclasses
from dataclasses import replace

import pytest
import torch

from heedful import AttentionProblem, AttentionStrategy, Causal, KeyPadding, Limits, Refusal, Refused, Varlen
from heedful.errors import CannotLoad
from heedful.facts import Facts
from heedful.masks import Bias, Dense, Mask, MaskFacts, SlidingWindow, as_mask, facts_of
from heedful.sources import Hub, Kernels, Package
from heedful.strategy import ALL_MASKS, Pin, mask_arguments, static_arguments

PLAIN = AttentionProblem(
    batch=2, heads=8, kv_heads=8, query_length=64, key_length=96, head_dim=64, value_dim=64, dtype=torch.float16
)
H100 = PLAIN.replace(device="cuda", capability=(9, 0), architecture="sm_90")
MI300 = PLAIN.replace(device="cuda", architecture="gfx942")
BIAS = MaskFacts(bias="QK", bias_dtype=torch.float16, rows_seen=True)
DENSE = MaskFacts(dense="QK", rows_seen=True)
GENEROUS = Limits(
    value_dim_may_differ=True,
    masks=ALL_MASKS,
    mixed_masks=True,
    causal_alignments=("top_left", "bottom_right"),
    bias_in_query_dtype=False,
    bias_backward=True,
    empty_rows=frozenset({"output", "lse"}),
    gqa=True,
    scale=True,
    softcap=True,
    dropout=True,
    lse=True,
    backward=True,
    deterministic_backward=True,
    compile=True,
    options=frozenset({"block"}),
    loose_packs=True,
)

# field: (the value that refuses, the problem it refuses, the refusal's field, words of its text)
EFFECTS = {
    "devices": (("cuda", "xpu"), PLAIN, "device", "device is cpu, it takes cuda or xpu"),
    "min_capability": ((9, 1), H100, "compute capability", "compute capability is 9.0, it takes at least 9.1"),
    "max_capability": ((8, 9), H100, "compute capability", "compute capability is 9.0, it takes at most 8.9"),
    "architectures": (("gfx90a", "gfx11"), MI300, "architecture", "architecture is gfx942, it takes gfx90a/gfx11"),
    "dtypes": ((torch.float32, torch.bfloat16), PLAIN, "dtype", "dtype is float16, it takes float32/bfloat16"),
    "min_head_dim": (80, PLAIN, "head dim padding", "head dim padding is 64, it takes multiples of 1 from 80"),
    "max_head_dim": (56, PLAIN, "head dim", "head dim is 64, it takes at most 56"),
    "head_dim_multiple": (24, PLAIN, "head dim padding", "head dim padding is 64, it takes multiples of 24 from 1"),
    "value_dim_may_differ": (False, PLAIN.replace(value_dim=72), "value dim", "value dim is 72 beside head dim 64"),
    "layouts": (("BSHD", "THD"), PLAIN, "layout", "layout is BHSD, it takes BSHD/THD"),
    "masks": (frozenset({"causal", "bias"}), PLAIN.replace(mask=DENSE), "mask", "mask is dense, it takes bias/causal"),
    "mixed_masks": (
        False,
        PLAIN.replace(mask=replace(DENSE, causal="top_left")),
        "mask mix",
        "mask mix is causal & dense, it takes one kind at a time",
    ),
    "causal_alignments": (
        ("top_left",),
        PLAIN.replace(mask=MaskFacts(causal="bottom_right")),
        "causal alignment",
        "causal alignment is bottom_right, it takes top_left",
    ),
    "bias_in_query_dtype": (
        True,
        PLAIN.replace(mask=replace(BIAS, bias_dtype=torch.float32)),
        "bias dtype",
        "bias dtype is float32, it takes float16",
    ),
    "bias_backward": (False, PLAIN.replace(mask=replace(BIAS, bias_needs_grad=True)), "bias gradient", "bias gradient"),
    "empty_rows": (
        frozenset({"output"}),
        PLAIN.replace(mask=MaskFacts(dense="QK"), needs_lse=True),
        "empty rows",
        "rows that see a key",
    ),
    "gqa": (False, PLAIN.replace(kv_heads=2), "kv heads", "kv heads is 2 for 8 query heads"),
    "scale": (False, PLAIN.replace(scale=0.3), "scale", "scale is 0.3, it takes 1/sqrt(head dim)"),
    "softcap": (False, PLAIN.replace(softcap=30.0), "softcap", "softcap is 30.0, it takes none"),
    "dropout": (False, PLAIN.replace(dropout_p=0.2), "dropout_p", "dropout_p is 0.2, it takes 0.0"),
    "lse": (False, PLAIN.replace(needs_lse=True), "return_lse", "return_lse is wanted"),
    "backward": (False, PLAIN.replace(needs_grad=True), "gradient", "gradient is wanted"),
    "deterministic_backward": (
        False,
        PLAIN.replace(needs_grad=True, deterministic=True),
        "deterministic gradient",
        "nondeterministic ones only",
    ),
    "compile": (False, PLAIN.replace(compiling=True), "torch.compile", "torch.compile is tracing"),
    "options": (
        frozenset({"block", "stages"}),
        PLAIN.replace(options=(("blocks", 1),)),
        "options",
        "options is 'blocks', it takes block, stages",
    ),
    "bfloat16_from": (
        (9, 1),
        H100.replace(dtype=torch.bfloat16),
        "dtype",
        "dtype is bfloat16 on sm_90, it takes bfloat16 from 9.1 on (use float16 or float32)",
    ),
    "max_batch": (1, PLAIN, "batch", "batch is 2, it takes at most 1 (split the batch)"),
    "loose_packs": (
        False,
        PLAIN.replace(mask=MaskFacts(varlen=True, packing="loose")),
        "packing",
        "packing is loose, it takes sequences that cover all tokens and have keys",
    ),
}
# What is taken beyond need, or not tried: test_lowering and test_select are about them.
NO_REFUSAL = {"faster_with", "scores_in_memory", "faster_from", "contends"}


def test_every_limit_is_in_the_table():
    assert set(EFFECTS) == {field.name for field in dataclasses.fields(Limits)} - NO_REFUSAL


def test_what_pays_refuses_nothing():
    for limits in (Limits(), GENEROUS):
        pays = replace(limits, faster_with=frozenset({"gather_keys", "upcast"}))
        for _, problem, _, _ in EFFECTS.values():
            assert list(pays.refusals(problem)) == list(limits.refusals(problem))


@pytest.mark.parametrize(
    ("packing", "remedy"),
    [("tidy", None), ("loose", "tidy it"), ("unknown", "leave mask analysis on, outside of torch.compile")],
)
def test_a_packing_that_was_not_read_is_no_tidy_one(packing, remedy):
    problem = PLAIN.replace(mask=MaskFacts(varlen=True, packing=packing))
    found = list(replace(GENEROUS, loose_packs=False).refusals(problem))
    assert [refusal.remedy for refusal in found] == ([] if remedy is None else [remedy])


def test_every_batch_is_taken_without_a_bound_and_up_to_it():
    for most in (None, 2, 3):
        assert list(replace(GENEROUS, max_batch=most).refusals(PLAIN)) == []


@pytest.mark.parametrize("field", EFFECTS)
def test_each_limit_has_an_effect_of_its_own(field):
    value, problem, refused, words = EFFECTS[field]
    if field != "options":
        assert list(GENEROUS.refusals(problem)) == []
    (refusal,) = replace(GENEROUS, **{field: value}).refusals(problem)
    assert refusal.field == refused
    assert words in str(refusal)
    assert refusal.remedy in str(refusal)


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (PLAIN.replace(sinks=True), "sinks"),
        (PLAIN.replace(autocast=True), "autocast"),
        (PLAIN.replace(broadcast=True), "leading sizes"),
        (PLAIN.replace(options=(("other", 1),)), "options"),
    ],
)
def test_what_no_limit_allows(problem, words):
    (refusal,) = GENEROUS.refusals(problem)
    assert refusal.field == words


def test_limits_that_declare_nothing_are_conservative():
    assert list(Limits().refusals(PLAIN)) == []
    trips = {"masks", "mixed_masks", "causal_alignments", "value_dim_may_differ", "bias_backward", "empty_rows", "gqa"}
    trips |= {"scale", "softcap", "dropout", "lse", "backward", "deterministic_backward", "compile", "options"}
    trips |= {"loose_packs"}
    for field in trips:
        assert list(Limits().refusals(EFFECTS[field][1])), field


def test_every_broken_limit_is_told():
    problem = PLAIN.replace(head_dim=77, value_dim=77, scale=0.5, needs_lse=True, mask=DENSE)
    found = [refusal.field for refusal in Limits(head_dim_multiple=8, dtypes=(torch.float32,)).refusals(problem)]
    assert found == ["dtype", "head dim padding", "mask", "scale", "return_lse"]


def test_on_another_device_only_that_is_told():
    assert [r.field for r in Limits(devices=("cuda",)).refusals(PLAIN.replace(scale=0.5))] == ["device"]


@pytest.mark.parametrize(
    ("limits", "nvidia", "amd"),
    [
        (Limits(), True, True),
        (Limits(min_capability=(8, 0)), True, False),
        (Limits(max_capability=(9, 0)), True, False),
        (Limits(architectures=("gfx9",)), False, True),
        (Limits(min_capability=(8, 0), architectures=("gfx9",)), True, True),
        (Limits(min_capability=(8, 0), architectures=("gfx11",)), True, False),
    ],
)
def test_limits_of_one_maker_are_for_its_devices(limits, nvidia, amd):
    assert (not list(limits.refusals(H100)), not list(limits.refusals(MI300))) == (nvidia, amd)
    assert not list(limits.refusals(PLAIN)), "a CPU is of neither"


@pytest.mark.parametrize(("capability", "takes"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((10, 0), False)])
def test_capabilities_compare_as_numbers(capability, takes):
    limits = Limits(min_capability=(8, 0), max_capability=(9, 0))
    assert (not list(limits.refusals(H100.replace(capability=capability)))) is takes


def test_a_refusal_is_a_sentence():
    assert (
        str(Refusal("head dim", "512", "at most 256", "use native"))
        == "head dim is 512, it takes at most 256 (use native)"
    )
    assert str(Refusal("head dim", "512", "at most 256")) == "head dim is 512, it takes at most 256"


# The base class


class TwoDevices(AttentionStrategy):
    """Has limits for two devices.

    And more to say, which is not for tables.
    """

    name = "two"
    limits = (Limits(devices=("cpu",), gqa=True), Limits(devices=("cuda", "xpu"), scale=True))

    def compute_attention(self, query, key, value, **kwargs):
        return query, kwargs


def test_limits_are_those_of_the_device():
    assert TwoDevices().limits_for("cpu").gqa
    assert TwoDevices().limits_for("xpu").scale


def test_a_device_without_limits_is_told_all_that_have_some():
    (refusal,) = TwoDevices().refusals(PLAIN.replace(device="mps"))
    assert str(refusal).startswith("device is mps, it takes cpu or cuda or xpu")


def test_validation_raises_every_refusal():
    query = torch.zeros(1, 4, 3, 8)
    TwoDevices().validate_constraints(query=query, key=query, value=query)
    with pytest.raises(Refused, match=r"dropout_p is 0\.5") as caught:
        TwoDevices().validate_constraints(query=query, key=query, value=query, scale=0.3, dropout_p=0.5)
    assert [reason.field for reason in caught.value.refusals["two"]] == ["scale", "dropout_p"]


def test_validate_and_compute_hands_on_only_what_is_not_default():
    query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    call = {"dropout_p": 0.0, "is_causal": False, "scale": None, "return_lse": False}
    assert TwoDevices().validate_and_compute(query, key, key, enable_gqa=True, **call)[1] == {"enable_gqa": True}


def test_a_strategy_without_name_is_refused_by_its_class_name():
    class Nameless(AttentionStrategy):
        def compute_attention(self, query, key, value):
            return query

    query = torch.zeros(1, 4, 3, 8)
    with pytest.raises(Refused, match=r"Nameless refuses: scale is 0\.3"):
        Nameless().validate_constraints(query=query, key=query, value=query, scale=0.3)


def test_a_strategy_that_cannot_compute_is_abstract():
    with pytest.raises(TypeError, match="compute_attention"):
        AttentionStrategy()


def test_own_validation_is_noticed():
    class Own(TwoDevices):
        def validate_constraints(self, **kwargs):
            """Refuse nothing."""

    class Heir(Own):
        pass

    assert [kind.has_own_validation() for kind in (TwoDevices, Own, Heir)] == [False, True, True]


def test_the_description_is_the_first_line_of_a_docstring():
    assert TwoDevices.describe() == "Has limits for two devices."
    undocumented = type("Undocumented", (TwoDevices,), {"__module__": __name__})
    assert undocumented.describe() == __doc__.partition("\n")[0]
    assert type("Lost", (TwoDevices,), {"__module__": "no.such.module"}).describe() == ""


# Sources, kernels and pins

BARE = Facts("2", "3", "Linux", {}, {})
WITH_MINE = Facts("2", "3", "Linux", {}, {"mine": "", "kernels": ""})


class Noting(Package):
    """A package that notes each import."""

    loads: list = []

    def load(self):
        self.loads.append(self.module)
        return Kernels(f=self.module)


class FromAfar(TwoDevices):
    """Has two sources and other names."""

    name = "afar"
    aliases = {"afar_too": Pin(), "afar_hub": Pin("hub"), "afar_packed": Pin(layouts=("THD",))}
    sources = (Noting("mine", ("f",)), Hub("someone/attention", 3, ("f",)))


def pinned(**fields):
    made = FromAfar()
    made.pin = Pin(**fields)
    return made


def test_other_names_are_a_tuple_or_a_mapping_to_pins():
    assert FromAfar.pins() == FromAfar.aliases
    assert type("Plain", (TwoDevices,), {"aliases": ("a", "b")}).pins() == {"a": Pin(), "b": Pin()}
    assert TwoDevices.pins() == {}


def test_a_strategy_without_sources_lacks_nothing():
    assert TwoDevices().lacks(BARE) == ()
    TwoDevices().load(BARE)
    assert TwoDevices().kernels == Kernels()


def test_what_lacks_is_what_every_source_lacks():
    assert [lack.field for lack in FromAfar().lacks(BARE)] == ["package", "package"]
    with_kernels = Facts("2", "3", "Linux", {}, {"kernels": "0.17"})
    assert [lack.field for lack in FromAfar().lacks(with_kernels)] == ["package", "download"]
    assert [lack.field for lack in FromAfar().lacks(with_kernels, downloads=True)] == ["package", "download"]
    assert pinned(source="hub").lacks(with_kernels, downloads=True) == ()
    assert FromAfar().lacks(WITH_MINE) == ()
    assert FromAfar().lacks(Facts("2", "3", "Linux")) == ()


def test_a_pinned_source_is_the_only_one_that_is_looked_for():
    assert [lack.field for lack in pinned(source="hub").lacks(WITH_MINE)] == ["download"]
    assert pinned(source="package").lacks(WITH_MINE) == ()
    assert pinned(source="hub").limits_for("cpu") == FromAfar().limits_for("cpu")


def test_pinned_layouts_are_the_only_ones():
    assert pinned(layouts=("THD",)).limits_for("cpu").layouts == ("THD",)
    assert pinned(layouts=("THD",)).limits_for("cpu").gqa
    assert FromAfar().limits_for("cpu").layouts == ("BHSD",)


def test_kernels_are_loaded_once_and_only_when_wanted():
    Noting.loads.clear()
    one = FromAfar()
    one.lacks(WITH_MINE)
    assert Noting.loads == []
    for _ in range(2):
        one.load(WITH_MINE)
        assert one.kernels.f == "mine"
    assert Noting.loads == ["mine"]


def test_kernels_that_cannot_be_loaded_are_told_with_every_reason():
    with pytest.raises(CannotLoad, match=r"mine not installed.*; package is kernels not installed"):
        FromAfar().load(BARE)


# The arguments of compute_attention


def test_a_plain_problem_needs_no_argument():
    assert static_arguments(PLAIN) == {}
    assert mask_arguments(None) == mask_arguments(Mask()) == {}


@pytest.mark.parametrize(
    ("changes", "arguments"),
    [
        ({"mask": MaskFacts(causal="top_left")}, {"is_causal": True}),
        ({"mask": MaskFacts(causal="bottom_right")}, {"is_causal": True, "causal_alignment": "bottom_right"}),
        ({"mask": MaskFacts(window=(0, None, "top_left"))}, {"window": (0, None)}),
        (
            {"mask": MaskFacts(window=(2, 1, "bottom_right"))},
            {"window": (2, 1), "window_alignment": "bottom_right"},
        ),
        ({"dropout_p": 0.5}, {"dropout_p": 0.5}),
        ({"scale": 0.0}, {"scale": 0.0}),
        ({"kv_heads": 2}, {"enable_gqa": True}),
        ({"softcap": 30.0}, {"softcap": 30.0}),
        ({"needs_lse": True}, {"return_lse": True}),
        ({"options": (("block", 64), ("fast", False))}, {"block": 64, "fast": False}),
    ],
)
def test_arguments_that_follow_from_the_problem(changes, arguments):
    assert static_arguments(PLAIN.replace(**changes)) == arguments


def test_arguments_that_are_tensors_of_the_mask():
    keep, bias = torch.ones(1, 1, 3, 3, dtype=torch.bool), torch.zeros(1, 1, 3, 3)
    padding, rows = torch.ones(2, 1, 3, dtype=torch.bool).unbind()
    packing = Varlen(torch.tensor([0, 3]))
    block = type("BlockMask", (), {"__module__": "torch.nn.attention.flex_attention"})()
    for mask, expected in (
        (Dense(keep), {"attn_mask": keep}),
        (Bias(bias), {"attn_mask": bias}),
        (Dense(keep) & Bias(bias), {"attn_mask": keep, "attn_bias": bias}),
        (KeyPadding(padding) & packing, {"key_padding": padding, "varlen": packing}),
        (KeyPadding(padding, queries=rows), {"key_padding": padding, "query_padding": rows}),
        (Causal() & SlidingWindow(1, 1), {}),
        (as_mask(block), {"block_mask": block}),
    ):
        given = mask_arguments(mask)
        assert given.keys() == expected.keys()
        assert [name for name in expected if given[name] is not expected[name]] == []


def test_every_kind_of_mask_is_known():
    everything = MaskFacts("top_left", (1, 1, "top_left"), True, True, "", "", torch.float32, True, True)
    everything = replace(everything, query_padding=True)
    assert set(everything.kinds) == ALL_MASKS
    assert facts_of(Mask()).kinds == ()
