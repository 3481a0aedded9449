"""Handwritten digits by diffusion: the data, the prompts and the pipeline.

The model is diffusers' own ``UNet2DConditionModel`` on 8x8 pictures. It is prompted with the English name of a
digit, one token a letter, padded to the longest name and masked. So a single step exercises self-attention,
cross-attention and a key padding mask, as the large text-to-image models do.

Shapes: B batch, T letters of the longest name, F features of a letter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = "".join(sorted(set("".join(NAMES))))
LONGEST = max(map(len, NAMES))
FEATURES = len(LETTERS) + LONGEST
SIDE = 8
WEIGHTS = Path(__file__).parent / "weights"


def encode(names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Letters as one-hot vectors with a one-hot position: features (B, T, F) and the mask of real letters (B, T)."""
    features = torch.zeros(len(names), LONGEST, FEATURES)
    mask = torch.zeros(len(names), LONGEST, dtype=torch.bool)
    for row, name in enumerate(names):
        if name not in NAMES:
            raise ValueError(f"the digits model knows the names {', '.join(NAMES)}; got {name!r}")
        for place, letter in enumerate(name):
            features[row, place, LETTERS.index(letter)] = 1.0
            features[row, place, len(LETTERS) + place] = 1.0
            mask[row, place] = True
    return features, mask


def real_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 handwritten digits that scikit-learn ships: pictures in [-1, 1] (1797, 8, 8) and labels (1797,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 8.0 - 1.0).astype(np.float32), data.target.astype(np.int64)


def new_unet() -> UNet2DConditionModel:
    """The untrained network: about 0.7 million parameters, attention at 64 and at 16 tokens."""
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 48),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=FEATURES,
        attention_head_dim=2,
    )


def new_scheduler() -> DDIMScheduler:
    """The noise schedule that the network is trained on."""
    return DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", clip_sample=True)


class DigitsPipeline(DiffusionPipeline):
    """Names of digits in, pictures (B, 8, 8) in [0, 1] out; deterministic for a seed."""

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, names: Sequence[str], *, seed: int = 0, steps: int = 25, on_step: Callable[[], None] | None = None
    ) -> Tensor:
        """Draw one picture for each name. ``on_step`` is called after each of the ``steps`` denoising steps."""
        features, mask = encode(names)
        device, dtype = self.unet.device, self.unet.dtype
        features, mask = features.to(device, dtype), mask.to(device)
        noise = torch.Generator("cpu").manual_seed(seed)
        sample = torch.randn(len(names), 1, SIDE, SIDE, generator=noise).to(device, dtype)
        self.scheduler.set_timesteps(steps, device=device)
        for step in self.scheduler.timesteps:
            prediction = self.unet(sample, step, features, encoder_attention_mask=mask).sample
            sample = self.scheduler.step(prediction, step, sample).prev_sample
            if on_step is not None:
                on_step()
        return (sample[:, 0].float() / 2 + 0.5).clamp(0, 1).cpu()


def load_pipeline() -> DigitsPipeline:
    """The trained pipeline, from the weights in the package; no network."""
    unet = UNet2DConditionModel.from_pretrained(WEIGHTS, local_files_only=True, low_cpu_mem_usage=False).eval()
    return DigitsPipeline(unet=unet, scheduler=new_scheduler())


def recogniser(seed: int = 0) -> tuple[Callable[[Tensor], np.ndarray], float]:
    """A classifier trained on three quarters of the real digits, and its accuracy on the quarter it has not seen.

    It maps pictures (B, 8, 8) in [0, 1] to labels (B,).
    """
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC

    pictures, labels = real_digits()
    flat = pictures.reshape(len(pictures), -1)
    seen, held_out, seen_labels, held_out_labels = train_test_split(
        flat, labels, test_size=0.25, random_state=seed, stratify=labels
    )
    model = SVC(C=10.0, gamma=0.02).fit(seen, seen_labels)

    def recognise(drawn: Tensor) -> np.ndarray:
        return np.asarray(model.predict(drawn.reshape(len(drawn), -1).numpy() * 2 - 1))

    return recognise, float(model.score(held_out, held_out_labels))
