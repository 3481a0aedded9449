"""A Stable Diffusion pipeline: one line reaches UNet, text encoder and VAE, and the report says what ran.

    python examples/sd_unet.py

The pipeline here is tiny, with random weights, and is built offline. The real one:

    pipeline = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
"""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import heedful


def tiny_pipeline() -> StableDiffusionPipeline:
    """The parts of Stable Diffusion 1.5, as small as they go."""
    torch.manual_seed(0)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "cat</w>": 3}
    tokens = {"vocab_size": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 8}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    blocks = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **blocks
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**sizes, **tokens)),
        tokenizer=CLIPTokenizer(vocab=words, merges=[], model_max_length=8),
        unet=UNet2DConditionModel(
            sample_size=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            **blocks,
        ),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def draw(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    """The same picture each time: (1, height, width, 3), from 0 to 1."""
    start = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipeline("a cat", num_inference_steps=2, generator=start, output_type="np").images)


def main() -> None:
    """Draw it as diffusers does, then by heedful; compare, report, and put everything back."""
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    before = draw(pipeline)

    # Names are obeyed, lists are fallback orders, "auto" is the fastest exact backend; rules go by module path.
    heedful.set_attention_backend(pipeline, "auto", rules={"vae.*": "native"})
    after = draw(pipeline)
    print(heedful.attention_report(pipeline))
    print(f"\nlargest difference of a pixel: {(after - before).abs().max():.1e}")

    heedful.reset_attention_backend(pipeline)
    print("after reset the picture is the same, bit for bit:", torch.equal(draw(pipeline), before))


if __name__ == "__main__":
    main()
