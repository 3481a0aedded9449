"""Attention shapes of real models: the one table behind tests, benches, tuning and docs.

A case is one attention call as the published model makes it at its usual size, with the place its numbers
come from. Batch is 2 where the pipeline runs both halves of classifier-free guidance (CFG) in one call, else 1.
How much of a padded text is kept depends on the prompt: `kept_keys` of a padded case is a typical caption, chosen here.

Shapes: B batch, H heads, K key/value heads, Sq queries, Sk keys, D head size, Dv value head size; layout BHSD.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import Tensor

Mask = Literal["none", "causal", "key_padding"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One named attention call; refuses, with ValueError, numbers that contradict each other.

    `gpu_only`: over 2e12 flops (about 20 s in fp32 on two CPU cores), or over 2 GB in fp32 for query, key, value,
    output and the scores of 128 queries. A case without it may still have a score matrix that does not fit.
    """

    name: str
    model: str
    batch: int
    heads: int
    kv_heads: int = None  # type: ignore[assignment]  # None: as many as heads; always an int once built
    query_length: int
    key_length: int
    head_dim: int
    value_dim: int = None  # type: ignore[assignment]  # None: head_dim; always an int once built
    mask: Mask = "none"  # "key_padding": padding on the right, a length for each batch row
    kept_keys: float | None = None  # fraction of keys kept, for "key_padding" only
    gpu_only: bool = False
    source: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.heads if self.kv_heads is None else self.kv_heads)
        object.__setattr__(self, "value_dim", self.head_dim if self.value_dim is None else self.value_dim)
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.name}: {self.heads} heads do not divide over {self.kv_heads} kv heads")
        if self.mask not in get_args(Mask):
            raise ValueError(f"{self.name}: mask {self.mask!r} is none of {', '.join(get_args(Mask))}")
        if (self.mask == "key_padding") != (self.kept_keys is not None):
            raise ValueError(f"{self.name}: kept_keys goes with mask 'key_padding' and with no other")
        if self.kept_keys is not None and not 0 < self.kept_keys <= 1:
            raise ValueError(f"{self.name}: kept_keys is a fraction in (0, 1], got {self.kept_keys}")

    @property
    def query_shape(self) -> tuple[int, int, int, int]:
        """(B, H, Sq, D)"""
        return self.batch, self.heads, self.query_length, self.head_dim

    @property
    def key_shape(self) -> tuple[int, int, int, int]:
        """(B, K, Sk, D)"""
        return self.batch, self.kv_heads, self.key_length, self.head_dim

    @property
    def value_shape(self) -> tuple[int, int, int, int]:
        """(B, K, Sk, Dv)"""
        return self.batch, self.kv_heads, self.key_length, self.value_dim

    @property
    def flops(self) -> int:
        """Operations of both matrix products, 2·B·H·Sq·Sk·(D + Dv); half of it for causal, padding not deducted."""
        dense = 2 * self.batch * self.heads * self.query_length * self.key_length * (self.head_dim + self.value_dim)
        return dense // 2 if self.mask == "causal" else dense

    def tensors(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Seeded N(0, 1) query, key and value in BHSD, and the mask.

        The mask is bool (B, Sk), True = attend, for "key_padding"; None otherwise (for "causal", pass is_causal).
        The numbers are drawn in fp32, so each dtype rounds the same ones; another kind of device draws others.
        """
        generator = torch.Generator(device=device).manual_seed(seed)
        shapes = self.query_shape, self.key_shape, self.value_shape
        query, key, value = (torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)
        return query, key, value, self._keep_mask(device, seed)

    def _keep_mask(self, device: str | torch.device, seed: int) -> Tensor | None:
        """Bool (B, Sk); row lengths spread evenly round the kept fraction, by a quarter of what is kept or dropped."""
        if self.kept_keys is None:
            return None
        offset_B = torch.rand(self.batch, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        fraction_B = self.kept_keys + offset_B.double() * min(self.kept_keys, 1 - self.kept_keys) / 4
        length_B = (fraction_B * self.key_length).round().clamp(1, self.key_length)
        return (torch.arange(self.key_length) < length_B[:, None]).to(device)


def _case(
    name: str,
    model: str,
    shape: tuple[int, int, int, int, int],
    source: str,
    *,
    kv_heads: int | None = None,
    mask: Mask = "none",
    kept_keys: float | None = None,
    gpu_only: bool = False,
) -> Case:
    """A row of the table; `shape` is (B, H, Sq, Sk, D), and kept_keys makes the mask a key padding."""
    batch, heads, query_length, key_length, head_dim = shape
    return Case(
        name=name,
        model=model,
        batch=batch,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        query_length=query_length,
        key_length=key_length,
        head_dim=head_dim,
        mask=mask if kept_keys is None else "key_padding",
        kept_keys=kept_keys,
        gpu_only=gpu_only,
        source=source,
    )


_SD15 = (
    "UNet2DConditionModel, stable-diffusion-v1-5/stable-diffusion-v1-5 unet: 512² image, latent 64²; "
    "320, 640, 1280 channels at 64², 32², 16² in 8 heads (attention_head_dim 8 is the head count); CFG"
)
_SDXL = (
    "UNet2DConditionModel, stabilityai/stable-diffusion-xl-base-1.0 unet: 1024² image, latent 128²; "
    "640, 1280 channels at 64², 32² in 10, 20 heads (attention_head_dim 5, 10, 20 is the head count); CFG"
)
_CLIP_TEXT = "CLIP text 77, unmasked"
_PIXART = "PixArtTransformer2DModel, PixArt-alpha/PixArt-Sigma-XL-2-1024-MS: latent 128² / patch 2 -> 64² = 4096; CFG"
_WAN = (
    "WanTransformer3DModel, Wan-AI/Wan2.1-T2V-{}-Diffusers: 480x832, 81 frames: "
    "latent 21x60x104 / patch 1x2x2 -> 21·30·52 = 32760; CFG as two calls"
)
_LTX = "LTXVideoTransformer3DModel, Lightricks/LTX-Video: 512x704, 161 frames -> latent 21·16·22 = 7392; CFG"
_VAE = "AutoencoderKL, {} vae: mid-block of 512 channels in one head, {}² image / 8; decoded after CFG, so one image"
_LLAMA = "LlamaConfig, meta-llama/Meta-Llama-3-8B: 32 heads, 8 kv heads, hidden 4096 / 32 = 128, context up to 8192"

CASES: tuple[Case, ...] = (
    _case("sd15-self-64", "Stable Diffusion 1.5", (2, 8, 4096, 4096, 40), _SD15),
    _case("sd15-self-32", "Stable Diffusion 1.5", (2, 8, 1024, 1024, 80), _SD15),
    _case("sd15-self-16", "Stable Diffusion 1.5", (2, 8, 256, 256, 160), _SD15),
    _case("sd15-cross-64", "Stable Diffusion 1.5", (2, 8, 4096, 77, 40), f"{_SD15}; {_CLIP_TEXT}"),
    _case("sd15-cross-32", "Stable Diffusion 1.5", (2, 8, 1024, 77, 80), f"{_SD15}; {_CLIP_TEXT}"),
    _case("sd15-cross-16", "Stable Diffusion 1.5", (2, 8, 256, 77, 160), f"{_SD15}; {_CLIP_TEXT}"),
    _case("sdxl-self-64", "Stable Diffusion XL", (2, 10, 4096, 4096, 64), _SDXL),
    _case("sdxl-self-32", "Stable Diffusion XL", (2, 20, 1024, 1024, 64), _SDXL),
    _case("sdxl-cross-64", "Stable Diffusion XL", (2, 10, 4096, 77, 64), f"{_SDXL}; {_CLIP_TEXT}"),
    _case("sdxl-cross-32", "Stable Diffusion XL", (2, 20, 1024, 77, 64), f"{_SDXL}; {_CLIP_TEXT}"),
    _case(
        "sd3-medium-joint",
        "Stable Diffusion 3 medium",
        (2, 24, 4096 + 333, 4096 + 333, 64),
        "SD3Transformer2DModel, stabilityai/stable-diffusion-3-medium-diffusers: latent 128² / patch 2 -> 4096, "
        "text 77 CLIP + 256 T5 = 333, unmasked; CFG",
    ),
    _case(
        "flux1-joint",
        "FLUX.1 dev",
        (1, 24, 512 + 4096, 512 + 4096, 128),
        "FluxTransformer2DModel, black-forest-labs/FLUX.1-dev: 1024² image, latent 128² packed 2x2 -> 4096, "
        "after T5 text 512, unmasked; guidance embedded, so no CFG",
    ),
    _case("pixart-sigma-self", "PixArt-Sigma XL/2", (2, 16, 4096, 4096, 72), _PIXART),
    _case(
        "pixart-sigma-cross",
        "PixArt-Sigma XL/2",
        (2, 16, 4096, 300, 72),
        f"{_PIXART}; T5 text padded to 300, 60 kept",
        kept_keys=60 / 300,
    ),
    _case(
        "dit-xl2-self",
        "DiT-XL/2",
        (2, 16, 256, 256, 72),
        "DiTTransformer2DModel, facebook/DiT-XL-2-256, arXiv 2212.09748: 256² image, latent 32² / patch 2 "
        "-> 16² = 256; CFG",
    ),
    _case(
        "sana-cross",
        "Sana 1.6B",
        (2, 20, 1024, 300, 112),
        "SanaTransformer2DModel, Efficient-Large-Model/Sana_1600M_1024px_MultiLing_diffusers: 1024² image / 32 "
        "-> 32² = 1024, Gemma text padded to 300, 60 kept; CFG. Sana's self-attention is linear: no case for it",
        kept_keys=60 / 300,
    ),
    _case("wan21-1.3b-self", "Wan 2.1 1.3B", (1, 12, 32760, 32760, 128), _WAN.format("1.3B"), gpu_only=True),
    _case(
        "wan21-1.3b-cross",
        "Wan 2.1 1.3B",
        (1, 12, 32760, 512, 128),
        f"{_WAN.format('1.3B')}; UMT5 text 512, zeroed past its end but unmasked",
    ),
    _case("wan21-14b-self", "Wan 2.1 14B", (1, 40, 32760, 32760, 128), _WAN.format("14B"), gpu_only=True),
    _case(
        "hunyuan-video-joint",
        "HunyuanVideo",
        (1, 24, 118800 + 256, 118800 + 256, 128),
        "HunyuanVideoTransformer3DModel, hunyuanvideo-community/HunyuanVideo: 720x1280, 129 frames: latent 33x90x160 "
        "/ patch 1x2x2 -> 33·45·80 = 118800, then text padded to 256, 60 kept; guidance embedded, so no CFG",
        kept_keys=(118800 + 60) / (118800 + 256),
        gpu_only=True,
    ),
    _case(
        "cogvideox-2b-joint",
        "CogVideoX 2B",
        (2, 30, 226 + 17550, 226 + 17550, 64),
        "CogVideoXTransformer3DModel, THUDM/CogVideoX-2b: 480x720, 49 frames: latent 13x60x90 / patch 1x2x2 -> "
        "13·30·45 = 17550, after T5 text 226, unmasked; CFG",
        gpu_only=True,
    ),
    _case("ltx-video-self", "LTX-Video", (2, 32, 7392, 7392, 64), _LTX),
    _case(
        "ltx-video-cross",
        "LTX-Video",
        (2, 32, 7392, 128, 64),
        f"{_LTX}; T5 text padded to 128, 64 kept",
        kept_keys=64 / 128,
    ),
    _case(
        "qwen-image-joint",
        "Qwen-Image",
        (1, 24, 512 + 6889, 512 + 6889, 128),
        "QwenImageTransformer2DModel, Qwen/Qwen-Image: 1328² image / 8 / patch 2 -> 83² = 6889, after text of 512, "
        "the pipeline's default limit (one shorter prompt is not padded); CFG as two calls",
    ),
    _case(
        "vae-mid-64",
        "Stable Diffusion 1.5 VAE",
        (1, 1, 4096, 4096, 512),
        f"{_VAE.format('stable-diffusion-v1-5/stable-diffusion-v1-5', 512)}, 64² = 4096",
    ),
    _case(
        "vae-mid-128",
        "Stable Diffusion XL VAE",
        (1, 1, 16384, 16384, 512),
        f"{_VAE.format('stabilityai/stable-diffusion-xl-base-1.0', 1024)}, 128² = 16384",
    ),
    _case(
        "clip-l-text",
        "CLIP ViT-L/14 text",
        (1, 12, 77, 77, 64),
        "CLIPTextConfig, openai/clip-vit-large-patch14: hidden 768 / 12 heads = 64, 77 positions; one prompt a call",
        mask="causal",
    ),
    _case(
        "llama3-8b-prefill-4k",
        "Llama 3 8B",
        (1, 32, 4096, 4096, 128),
        f"{_LLAMA}; a prompt of 4096, chosen here",
        kv_heads=8,
        mask="causal",
    ),
    _case(
        "llama3-8b-decode-4k",
        "Llama 3 8B",
        (1, 32, 1, 4096, 128),
        f"{_LLAMA}; one new token that sees all 4096 keys, a length chosen here",
        kv_heads=8,
    ),
)


def by_name(name: str) -> Case:
    """The case called `name`; ValueError names the closest ones if there is none."""
    cases = {case.name: case for case in CASES}
    if name in cases:
        return cases[name]
    close = difflib.get_close_matches(name, cases, cutoff=0.4)
    raise ValueError(f"no case is called {name!r}; {'closest: ' if close else 'cases: '}{', '.join(close or cases)}")


def select(pattern: str = "*", *, gpu_only: bool | None = None) -> tuple[Case, ...]:
    """Cases whose name matches the shell pattern, in table order; of both kinds unless `gpu_only` is given."""
    return tuple(case for case in CASES if fnmatchcase(case.name, pattern) and gpu_only in (None, case.gpu_only))
