"""Train the digits model of ``heedful demo`` on the 1,797 real digits that scikit-learn ships.

    python examples/digits/train.py --out src/heedful/demo/weights

Seeded; the weights kept are the moving average of the last steps. A run can be stopped at any time: the last
complete checkpoint stays in the output folder.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from heedful.demo.digits import NAMES, encode, new_scheduler, new_unet, real_digits


def batches(size: int, generator: torch.Generator):
    """Endless shuffled batches: pictures (B, 1, 8, 8), features (B, T, F), mask (B, T)."""
    pictures, labels = (torch.from_numpy(array) for array in real_digits())
    features, mask = encode(NAMES)
    while True:
        for chosen in torch.randperm(len(labels), generator=generator).split(size):
            label = labels[chosen]
            yield pictures[chosen].unsqueeze(1), features[label], mask[label]


def save(model: nn.Module, out: Path) -> None:
    """Write beside the target, then swap, so that a killed run leaves a whole checkpoint."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def loss_of(unet: nn.Module, scheduler, batch: tuple[Tensor, Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """The usual noise-prediction loss, at one random time for each picture."""
    pictures, features, mask = batch
    noise = torch.randn(pictures.shape, generator=generator)
    times = torch.randint(0, scheduler.config.num_train_timesteps, (len(pictures),), generator=generator)
    noisy = scheduler.add_noise(pictures, noise, times)
    return nn.functional.mse_loss(unet(noisy, times, features, encoder_attention_mask=mask).sample, noise)


def train(out: Path, steps: int, batch_size: int, seed: int) -> None:
    """Train for a number of steps; keep the averaged weights every 500 steps and at the end."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    unet, scheduler = new_unet(), new_scheduler()
    average = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.5e-3, total_steps=steps, pct_start=0.05)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    data = batches(batch_size, generator)
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=steps)
        for step in range(1, steps + 1):
            loss = loss_of(unet, scheduler, next(data), generator)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(unet)
            progress.update(bar, advance=1, description=f"training, loss {loss.item():.4f}")
            if step % 500 == 0 or step == steps:
                save(average.module, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for config.json and the safetensors file")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))
