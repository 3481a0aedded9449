"""The table of real shapes: well-formed, reproducible, and in agreement with the libraries that define the models."""

import dataclasses
import inspect
import math
import re
from typing import Any

import pytest
import torch

from heedful.cases import CASES, Case, by_name, select

CPU_CASES = select(gpu_only=False)
PADDED_CASES = tuple(case for case in CASES if case.mask == "key_padding")
SMALL_CASES = tuple(case for case in CPU_CASES if math.prod(case.query_shape) + math.prod(case.key_shape) < 2**23)


def _names(cases: tuple[Case, ...]) -> list[str]:
    return [case.name for case in cases]


def _tiny(**changes: Any) -> Case:
    fields = {"name": "tiny", "model": "none", "batch": 2, "heads": 4, "query_length": 3, "key_length": 5}
    return Case(**{**fields, "head_dim": 8, "source": "made up", **changes})


# The table


def test_names_are_unique_and_well_formed() -> None:
    names = _names(CASES)
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9.]+(-[a-z0-9.]+)+", name) for name in names)


@pytest.mark.parametrize("case", CASES, ids=_names(CASES))
def test_row_is_complete_and_consistent(case: Case) -> None:
    assert case.model.strip()
    assert re.search(r"\w+(Model|Config|KL), [\w.-]+/[\w.-]+", case.source), "names a class and a repository"
    numbers = (case.batch, case.heads, case.kv_heads, case.query_length, case.key_length, case.head_dim, case.value_dim)
    assert all(isinstance(number, int) and number > 0 for number in numbers)
    assert case.heads % case.kv_heads == 0
    assert (case.kept_keys is None) == (case.mask != "key_padding")
    if case.mask == "causal":
        assert case.query_length == case.key_length, "which corner is_causal aligns to would matter"


@pytest.mark.parametrize("case", CASES, ids=_names(CASES))
def test_batch_is_two_exactly_where_guidance_doubles_it(case: Case) -> None:
    doubled = re.search(r"; CFG(;|\.|$)", case.source) is not None
    assert case.batch == (2 if doubled else 1)


@pytest.mark.parametrize("case", CASES, ids=_names(CASES))
def test_gpu_only_follows_its_rule(case: Case) -> None:
    output_and_query = math.prod(case.query_shape) + math.prod((*case.query_shape[:3], case.value_dim))
    scores = case.batch * case.heads * 128 * case.key_length
    fp32_bytes = 4 * (output_and_query + math.prod(case.key_shape) + math.prod(case.value_shape) + scores)
    assert case.gpu_only == (case.flops > 2e12 or fp32_bytes > 2e9)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("sd15-self-*", 3),
        ("sd15-cross-*", 3),
        ("sdxl-self-*", 2),
        ("sdxl-cross-*", 2),
        ("sd3-medium-*", 1),
        ("flux1-*", 1),
        ("pixart-sigma-*", 2),
        ("dit-*", 1),
        ("sana-*", 1),
        ("wan21-*", 3),
        ("hunyuan-video-*", 1),
        ("cogvideox-*", 1),
        ("ltx-video-*", 2),
        ("qwen-image-*", 1),
        ("vae-mid-*", 2),
        ("clip-*", 1),
        ("llama3-*", 2),
    ],
)
def test_required_models_are_present(pattern: str, count: int) -> None:
    assert len(select(pattern)) == count


def test_table_covers_what_strategies_differ_in() -> None:
    assert {case.mask for case in CASES} == {"none", "causal", "key_padding"}
    assert any(case.kv_heads < case.heads for case in CASES)
    assert any(case.head_dim > 256 for case in CASES)
    assert any(case.head_dim % 16 for case in CASES)
    assert any(case.gpu_only for case in CASES)


# One case


def test_defaults_are_filled_in() -> None:
    case = _tiny()
    assert (case.kv_heads, case.value_dim) == (4, 8)
    assert (case.query_shape, case.key_shape, case.value_shape) == ((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8))


def test_shapes_with_fewer_kv_heads_and_another_value_dim() -> None:
    case = _tiny(kv_heads=2, value_dim=16)
    assert (case.query_shape, case.key_shape, case.value_shape) == ((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 16))


def test_case_is_frozen_and_hashable() -> None:
    case = _tiny()
    assert {case: 1}[_tiny()] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        case.batch = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv_heads": 3}, "4 heads do not divide over 3 kv heads"),
        ({"mask": "window"}, "mask 'window' is none of"),
        ({"mask": "key_padding"}, "kept_keys goes with"),
        ({"kept_keys": 0.5}, "kept_keys goes with"),
        ({"mask": "key_padding", "kept_keys": 0.0}, "fraction"),
        ({"mask": "key_padding", "kept_keys": 1.5}, "fraction"),
    ],
)
def test_contradicting_numbers_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        _tiny(**changes)


def test_flops_checked_by_hand() -> None:
    assert by_name("sd15-self-64").flops == 42_949_672_960  # 4 · 2 · 8 · 4096² · 40
    assert by_name("clip-l-text").flops == 4 * 12 * 77 * 77 * 64 // 2 == 9_106_944  # causal: half
    assert by_name("llama3-8b-decode-4k").flops == 4 * 32 * 1 * 4096 * 128  # query heads count, kv heads do not
    assert _tiny(value_dim=16).flops == 2 * 2 * 4 * 3 * 5 * (8 + 16)


# Tensors


@pytest.mark.parametrize("case", SMALL_CASES, ids=_names(SMALL_CASES))
def test_tensors_have_the_declared_shapes(case: Case) -> None:
    query, key, value, mask = case.tensors()
    assert (query.shape, key.shape, value.shape) == (case.query_shape, case.key_shape, case.value_shape)
    assert {tensor.dtype for tensor in (query, key, value)} == {torch.float32}
    assert all(tensor.is_contiguous() for tensor in (query, key, value))
    if case.mask == "key_padding":
        assert mask is not None
        assert mask.dtype == torch.bool
        assert mask.shape == (case.batch, case.key_length)
    else:
        assert mask is None


def test_some_padded_case_is_small_enough_to_be_drawn() -> None:
    assert set(SMALL_CASES) & set(PADDED_CASES)


def test_tensors_are_standard_normal() -> None:
    for tensor in by_name("sd15-self-32").tensors()[:3]:
        assert tensor is not None
        assert abs(tensor.mean().item()) < 0.01
        assert abs(tensor.std().item() - 1) < 0.01


def test_tensors_repeat_by_seed_only() -> None:
    case = _tiny(mask="key_padding", key_length=400, kept_keys=0.5)
    first, again, other = case.tensors(seed=3), case.tensors(seed=3), case.tensors(seed=4)
    for a, b, c in zip(first, again, other, strict=True):
        assert a is not None
        assert b is not None
        assert c is not None
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert not torch.equal(first[1], first[2])


def test_tensors_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    _tiny(mask="key_padding", kept_keys=0.5).tensors()
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_each_dtype_rounds_the_same_numbers(dtype: torch.dtype) -> None:
    for exact, rounded in zip(_tiny().tensors()[:3], _tiny().tensors(dtype)[:3], strict=True):
        assert exact is not None
        assert rounded is not None
        assert rounded.dtype == dtype
        assert torch.equal(exact.to(dtype), rounded)


# The draw of the mask alone, so that it can be judged for the shapes that are too large to draw as tensors.


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("case", PADDED_CASES, ids=_names(PADDED_CASES))
def test_padding_is_on_the_right_and_about_as_much_as_declared(case: Case, seed: int) -> None:
    assert case.kept_keys is not None
    mask = case._keep_mask("cpu", seed)
    assert mask is not None
    assert mask.any(dim=1).all()
    assert not (mask[:, 1:] & ~mask[:, :-1]).any(), "no key is kept after a dropped one"
    share = mask.double().mean(dim=1)
    spread = min(case.kept_keys, 1 - case.kept_keys) / 4
    assert (share - case.kept_keys).abs().max().item() <= spread + 1 / case.key_length


def test_rows_differ_in_length_and_average_to_the_kept_fraction() -> None:
    mask = _tiny(batch=1000, key_length=1000, mask="key_padding", kept_keys=0.3)._keep_mask("cpu", 0)
    assert mask is not None
    assert len(set(mask.sum(dim=1).tolist())) > 50
    assert mask.double().mean().item() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize(("kept_keys", "kept"), [(1e-6, 1), (1.0, 5)])
def test_at_least_one_key_and_at_most_all_are_kept(kept_keys: float, kept: int) -> None:
    mask = _tiny(mask="key_padding", kept_keys=kept_keys).tensors()[3]
    assert mask is not None
    assert mask.sum(dim=1).tolist() == [kept, kept]


def test_video_tokens_of_hunyuan_are_never_padding() -> None:
    mask = by_name("hunyuan-video-joint")._keep_mask("cpu", 0)
    assert mask is not None
    assert mask[:, : 33 * 45 * 80].all()
    assert not mask.all()


# Looking up


def test_by_name_finds_every_case() -> None:
    assert [by_name(case.name) for case in CASES] == list(CASES)


def test_by_name_names_close_matches() -> None:
    with pytest.raises(ValueError, match=r"no case is called 'sd15-slef-64'; closest: .*sd15-self-64"):
        by_name("sd15-slef-64")


def test_by_name_lists_all_when_nothing_is_close() -> None:
    with pytest.raises(ValueError, match=r"cases: sd15-self-64, .*llama3-8b-decode-4k"):
        by_name("§")


def test_select() -> None:
    assert select() == CASES
    assert _names(select("vae-*")) == ["vae-mid-64", "vae-mid-128"]
    assert select("SD15-*") == () == select("no-such-*")
    assert set(select(gpu_only=True)) | set(CPU_CASES) == set(CASES)
    assert _names(select("wan21-*", gpu_only=False)) == ["wan21-1.3b-cross"]
    assert not any(case.gpu_only for case in CPU_CASES)


# Agreement with the libraries that define the models


def _defaults(library: Any, class_name: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(library, class_name).__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


@pytest.fixture(scope="module")
def diffusers() -> Any:
    return pytest.importorskip("diffusers", reason="the class defaults are read from an installed diffusers")


@pytest.mark.parametrize(
    ("class_name", "names"),
    [
        ("FluxTransformer2DModel", ["flux1-joint"]),
        ("PixArtTransformer2DModel", ["pixart-sigma-self", "pixart-sigma-cross"]),
        ("DiTTransformer2DModel", ["dit-xl2-self"]),
        ("WanTransformer3DModel", ["wan21-14b-self"]),
        ("HunyuanVideoTransformer3DModel", ["hunyuan-video-joint"]),
        ("CogVideoXTransformer3DModel", ["cogvideox-2b-joint"]),
        ("LTXVideoTransformer3DModel", ["ltx-video-self", "ltx-video-cross"]),
        ("QwenImageTransformer2DModel", ["qwen-image-joint"]),
    ],
)
def test_heads_agree_with_diffusers(diffusers: Any, class_name: str, names: list[str]) -> None:
    defaults = _defaults(diffusers, class_name)
    for name in names:
        case = by_name(name)
        assert (case.heads, case.head_dim) == (defaults["num_attention_heads"], defaults["attention_head_dim"])


def test_sana_cross_heads_agree_with_diffusers(diffusers: Any) -> None:
    defaults, case = _defaults(diffusers, "SanaTransformer2DModel"), by_name("sana-cross")
    assert (case.heads, case.head_dim) == (defaults["num_cross_attention_heads"], defaults["cross_attention_head_dim"])
    assert case.query_length == (defaults["sample_size"] // defaults["patch_size"]) ** 2


@pytest.mark.parametrize(
    ("class_name", "name"),
    [("PixArtTransformer2DModel", "pixart-sigma-self"), ("DiTTransformer2DModel", "dit-xl2-self")],
)
def test_image_tokens_agree_with_diffusers(diffusers: Any, class_name: str, name: str) -> None:
    defaults = _defaults(diffusers, class_name)
    assert by_name(name).query_length == (defaults["sample_size"] // defaults["patch_size"]) ** 2


def test_cogvideox_tokens_agree_with_diffusers(diffusers: Any) -> None:
    defaults = _defaults(diffusers, "CogVideoXTransformer3DModel")
    frames = (defaults["sample_frames"] - 1) // defaults["temporal_compression_ratio"] + 1
    per_frame = defaults["sample_height"] * defaults["sample_width"] // defaults["patch_size"] ** 2
    assert by_name("cogvideox-2b-joint").key_length == defaults["max_text_seq_length"] + frames * per_frame


@pytest.mark.parametrize(
    ("pipeline", "name", "space", "time", "text"),
    [
        ("WanPipeline", "wan21-1.3b-self", 16, 4, False),
        ("LTXPipeline", "ltx-video-self", 32, 8, False),
        ("HunyuanVideoPipeline", "hunyuan-video-joint", 16, 4, True),
    ],
)
def test_video_tokens_agree_with_diffusers_default_size(
    diffusers: Any, pipeline: str, name: str, space: int, time: int, text: bool
) -> None:
    """`space` and `time`: pixels and frames a token spans, VAE compression times patch."""
    size = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    height, width, frames = (size[key].default for key in ("height", "width", "num_frames"))
    tokens = ((frames - 1) // time + 1) * (height // space) * (width // space)
    assert by_name(name).query_length == tokens + (size["max_sequence_length"].default if text else 0)


@pytest.mark.parametrize(
    ("pipeline", "name"),
    [
        ("PixArtSigmaPipeline", "pixart-sigma-cross"),
        ("SanaPipeline", "sana-cross"),
        ("WanPipeline", "wan21-1.3b-cross"),
        ("LTXPipeline", "ltx-video-cross"),
    ],
)
def test_text_lengths_agree_with_diffusers(diffusers: Any, pipeline: str, name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, pipeline).__call__).parameters
    assert by_name(name).key_length == parameters["max_sequence_length"].default


def test_unet_levels_agree_with_diffusers(diffusers: Any) -> None:
    defaults = _defaults(diffusers, "UNet2DConditionModel")  # SD 1.5's: attention_head_dim is the number of heads
    heads = defaults["attention_head_dim"]
    for side, channels in zip((64, 32, 16), defaults["block_out_channels"], strict=False):
        for kind in ("self", "cross"):
            case = by_name(f"sd15-{kind}-{side}")
            assert (case.heads, case.head_dim, case.query_length) == (heads, channels // heads, side**2)


def test_vae_mid_block_agrees_with_diffusers(diffusers: Any) -> None:
    blocks = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}  # as published with SD 1.5 and SDXL
    types = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        attention = diffusers.AutoencoderKL(**blocks, **types).decoder.mid_block.attentions[0]
    for case in select("vae-mid-*"):
        assert (case.heads, case.head_dim) == (attention.heads, attention.inner_dim // attention.heads)


def test_clip_text_length_agrees_with_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="the config default is read from installed transformers")
    positions = transformers.CLIPTextConfig().max_position_embeddings
    assert by_name("clip-l-text").query_length == positions
    assert {case.key_length for case in (*select("sd15-cross-*"), *select("sdxl-cross-*"))} == {positions}


def test_llama_head_size_agrees_with_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="the config default is read from installed transformers")
    config = transformers.LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8)
    for case in select("llama3-*"):
        assert (case.heads, case.kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
        assert case.head_dim == config.head_dim
