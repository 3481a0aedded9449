"""A Flux pipeline: joint attention by one backend, the text encoders by another, each layer explained.

    python examples/flux.py

The pipeline here is tiny, with random weights, and is built offline. The real one:

    pipeline = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-schnell", torch_dtype=torch.bfloat16).to("cuda")
"""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

import heedful


def tiny_pipeline() -> FluxPipeline:
    """The parts of Flux, as small as they go."""
    torch.manual_seed(0)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "cat</w>": 3}
    tokens = {"vocab_size": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 8}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    t5 = T5Config(vocab_size=4, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    tokenizer = CLIPTokenizer(vocab=words, merges=[], model_max_length=8)
    return FluxPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(16, 16),
            norm_num_groups=8,
            shift_factor=0.0,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**sizes, **tokens)),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(),  # it has dropout
        tokenizer_2=tokenizer,
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def draw(pipeline: FluxPipeline) -> torch.Tensor:
    """The same picture each time: (1, height, width, 3), from 0 to 1."""
    start = torch.Generator().manual_seed(0)
    words = {"num_inference_steps": 2, "height": 16, "width": 16, "max_sequence_length": 8}
    return torch.from_numpy(pipeline("a cat", generator=start, output_type="np", **words).images)


def main() -> None:
    """Draw by diffusers, then by heedful; say what ran and why."""
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    before = draw(pipeline)

    # flash where it is installed and takes the call, else native; the text encoders are left alone.
    wish = ["flash", "native"]
    print(heedful.set_attention_backend(pipeline, wish, rules={"text_encoder*": "keep"}))
    after = draw(pipeline)
    print(f"\nlargest difference of a pixel: {(after - before).abs().max():.1e}\n")
    print(heedful.report())

    # Why not flash? Ask for a call of these sizes; nothing is computed.
    query = torch.zeros(1, 24, 4608, 128, dtype=torch.bfloat16)
    print()
    print(heedful.explain(query, query, query, backend=wish))


if __name__ == "__main__":
    main()
