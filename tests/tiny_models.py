"""Tiny models of diffusers and transformers with random weights, built offline from configs."""

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLWan,
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)


def tokenizer() -> CLIPTokenizer:
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>"]
    return CLIPTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[], model_max_length=8)


_LAYERS = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def text_encoder(kind: Any = CLIPTextModel) -> Any:
    tokens = {"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 8}
    return kind(CLIPTextConfig(**_LAYERS, **tokens, projection_dim=16)).eval()


def image_encoder() -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(**_LAYERS, image_size=8, patch_size=4, projection_dim=16)
    return CLIPVisionModelWithProjection(config).eval()


def t5(width: int = 16, kind: Any = T5EncoderModel, config: Any = T5Config) -> Any:
    return kind(config(vocab_size=8, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def vae(width: int = 16) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, width),
        norm_num_groups=8,
        shift_factor=0.0,
    ).eval()


_UNET: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}


def unet(**more: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = {**_UNET, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), **more}
    return UNet2DConditionModel(sample_size=8, **config).eval()


def controlnet() -> ControlNetModel:
    return ControlNetModel(**_UNET, conditioning_embedding_out_channels=(8, 8)).eval()


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def sd_pipeline() -> StableDiffusionPipeline:
    parts = {"vae": vae(), "text_encoder": text_encoder(), "tokenizer": tokenizer(), "unet": unet()}
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), **parts, **none)


def flux_pipeline() -> FluxPipeline:
    parts = {"vae": vae(), "text_encoder": text_encoder(), "tokenizer": tokenizer(), "transformer": flux()}
    second = {"text_encoder_2": t5(), "tokenizer_2": tokenizer()}
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts, **second)


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    model = unet(cross_attention_dim=32, projection_class_embeddings_input_dim=64, **added)
    parts = {"vae": vae(), "text_encoder": text_encoder(), "tokenizer": tokenizer(), "unet": model}
    second = {"text_encoder_2": text_encoder(CLIPTextModelWithProjection), "tokenizer_2": tokenizer()}
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return StableDiffusionXLPipeline(scheduler=scheduler, add_watermarker=False, **parts, **second)


def sd3() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


def sd3_pipeline() -> StableDiffusion3Pipeline:
    texts = {f"text_encoder{end}": text_encoder(CLIPTextModelWithProjection) for end in ("", "_2")}
    words = {f"tokenizer{end}": tokenizer() for end in ("", "_2", "_3")}
    parts = {"vae": vae(), "transformer": sd3(), "text_encoder_3": t5(32), **texts, **words}
    return StableDiffusion3Pipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts)


def pixart_pipeline() -> PixArtAlphaPipeline:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
    ).eval()
    parts = {"vae": vae(), "text_encoder": t5(), "tokenizer": tokenizer(), "transformer": transformer}
    return PixArtAlphaPipeline(scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), **parts)


def wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}
    more = {"text_dim": 16, "freq_dim": 16, "ffn_dim": 16, "num_layers": 1, "rope_max_seq_len": 16}
    return WanTransformer3DModel(**sizes, **more).eval()


def wan_vae() -> AutoencoderKLWan:
    small = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True]}
    scale = {"scale_factor_temporal": 2, "scale_factor_spatial": 2}
    return AutoencoderKLWan(**small, **scale, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()


def wan_pipeline() -> WanPipeline:
    parts = {"vae": wan_vae(), "text_encoder": t5(16, UMT5EncoderModel, UMT5Config), "tokenizer": tokenizer()}
    two = {"transformer": wan(), "transformer_2": wan(), "boundary_ratio": 0.9}
    return WanPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts, **two)


def sana_vae() -> AutoencoderDC:
    half: dict[str, Any] = {
        "block_types": ("ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 16),
        "layers_per_block": (1, 1),
        "qkv_multiscales": ((), (3,)),
    }
    halves = {f"{way}_{name}": value for name, value in half.items() for way in ("encoder", "decoder")}
    return AutoencoderDC(latent_channels=4, attention_head_dim=8, **halves).eval()


def gemma() -> Gemma2Model:
    sizes = {**_LAYERS, "num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 8}
    return Gemma2Model(Gemma2Config(**sizes, vocab_size=8, pad_token_id=1, bos_token_id=0, eos_token_id=1)).eval()


def sana_pipeline() -> SanaPipeline:
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    ).eval()
    parts = {"vae": sana_vae(), "text_encoder": gemma(), "tokenizer": tokenizer(), "transformer": transformer}
    return SanaPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts)


PIPELINES = {
    "sd": sd_pipeline,
    "sdxl": sdxl_pipeline,
    "sd3": sd3_pipeline,
    "flux": flux_pipeline,
    "pixart": pixart_pipeline,
    "wan": wan_pipeline,
    "sana": sana_pipeline,
}
_TWO_STEPS = {"num_inference_steps": 2}
_CALLS: dict[str, dict[str, Any]] = {
    "FluxPipeline": {"max_sequence_length": 8, "guidance_scale": 3.5},
    "StableDiffusion3Pipeline": {"max_sequence_length": 8},
    "PixArtAlphaPipeline": {
        **_TWO_STEPS, "max_sequence_length": 8, "clean_caption": False, "use_resolution_binning": False,
    },
    "WanPipeline": {**_TWO_STEPS, "max_sequence_length": 8, "num_frames": 1},
    "SanaPipeline": {
        "max_sequence_length": 8, "complex_human_instruction": None, "use_resolution_binning": False,
        "height": 32, "width": 32,
    },
}  # fmt: skip


def picture(pipeline: Any) -> Tensor:
    """Its picture, or frames, of a prompt, in one step (two for those that need them)."""
    usual = {"num_inference_steps": 1, "output_type": "pt", "height": 16, "width": 16, "guidance_scale": 1.0}
    more = {**usual, **_CALLS.get(type(pipeline).__name__, {})}
    made = pipeline("a b", generator=torch.Generator().manual_seed(0), **more)
    return made.frames if hasattr(made, "frames") else made.images
