"""The trained model: real data, prompts with a mask, and digits that a classifier of real ones recognises."""

import numpy as np
import pytest
import torch

from heedful.demo.digits import LONGEST, NAMES, WEIGHTS, encode, load_pipeline, real_digits, recogniser


def test_prompts_are_letters_with_a_mask():
    features, mask = encode(["zero", "one"])
    assert features.shape[:2] == mask.shape == (2, LONGEST)
    assert mask.sum(1).tolist() == [4, 3]
    assert torch.equal(features.sum(-1), 2.0 * mask)  # one letter and one place each, nothing under the mask


def test_every_name_has_its_own_prompt():
    features, _ = encode(NAMES)
    assert len({tuple(row.flatten().tolist()) for row in features}) == len(NAMES)


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match=r"knows the names zero, one.*got 'ten'"):
        encode(["ten"])


def test_the_data_are_the_real_digits():
    pictures, labels = real_digits()
    assert pictures.shape == (1797, 8, 8)
    assert pictures.min() == -1.0
    assert pictures.max() == 1.0
    assert np.bincount(labels).min() > 170


def test_the_weights_are_small_and_without_pickle():
    files = {path.name: path.stat().st_size for path in WEIGHTS.iterdir()}
    assert set(files) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert sum(files.values()) <= 4 * 2**20


def test_a_seed_gives_the_same_pictures():
    pipeline = load_pipeline()
    first, again, other = (pipeline(["two", "nine"], seed=seed, steps=4) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_drawn_digits_are_recognised():
    recognise, held_out = recogniser()
    assert held_out >= 0.97
    drawn = load_pipeline()([name for name in NAMES for _ in range(10)], seed=0, steps=25)
    assert (recognise(drawn) == np.repeat(np.arange(10), 10)).mean() >= 0.95


def test_the_recogniser_tells_noise_from_digits():
    recognise, _ = recogniser()
    noise = torch.rand(200, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (recognise(noise) == np.repeat(np.arange(10), 20)).mean() < 0.3
