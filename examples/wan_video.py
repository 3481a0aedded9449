"""A Wan video transformer: measured ahead of time, written into a lock, and replayed exactly.

    python examples/wan_video.py

The model here is tiny, with random weights, and is built offline. The real one:

    model = WanTransformer3DModel.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", subfolder="transformer")
"""

import tempfile
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

import heedful


def tiny_model() -> WanTransformer3DModel:
    """A video transformer of two blocks."""
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()


def main() -> None:
    """Two steps of one video: learnt from, locked, and repeated under the lock."""
    model = tiny_model()
    video = torch.randn(1, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))  # (B, channels, frames, H, W)
    text = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(1))

    def step() -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = model(video, torch.tensor([500]), text, return_dict=False)[0]
        return out

    heedful.set_attention_backend(model, "auto")
    for _ in range(3):
        step()
    print(heedful.attention_report(model))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wan.lock.json"
        lock = heedful.lock(path)  # what auto decided in this process
        print(f"\n{len(lock.plans)} plans are locked:")
        for plan in lock.plans.values():
            print(f"  {plan.problem}\n    {plan.label}, the same inputs give the same {plan.repeats}")
        with heedful.use_lock(path):
            same = torch.equal(step(), step())
    print(f"\nunder the lock two runs are the same, bit for bit: {same}")


if __name__ == "__main__":
    main()
