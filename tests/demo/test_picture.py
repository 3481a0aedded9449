"""Grids and sheets, pixel by pixel; a picture that cannot be written leaves the old one."""

import numpy as np
import pytest
from PIL import Image

from heedful.demo.picture import grid, save, side_by_side


def test_a_grid_holds_each_picture_in_its_place():
    pictures = np.stack([np.full((2, 2), level) for level in (0.0, 0.5, 1.0)])
    sheet = np.asarray(grid(pictures, columns=2, scale=3))
    assert sheet.shape == (15, 15, 3)
    assert (sheet[:6, :6] == 0).all()
    assert (sheet[:6, 9:] == 128).all()
    assert (sheet[9:, :6] == 255).all()


def test_a_grid_takes_colours_and_clips():
    red = np.zeros((1, 2, 2, 3))
    red[..., 0] = 1.7
    assert np.asarray(grid(red, columns=1, scale=1))[0, 0].tolist() == [255, 0, 0]


def test_a_sheet_holds_every_grid():
    tile = Image.new("RGB", (40, 30), (255, 0, 0))
    sheet = np.asarray(side_by_side([(f"backend {n}", "1 ms a step", tile) for n in range(4)], across=3))
    red = (sheet == [255, 0, 0]).all(-1)
    assert red.sum() == 4 * 40 * 30


def test_a_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
    target = tmp_path / "picture.png"
    save(Image.new("RGB", (4, 4), (1, 2, 3)), target)
    before = target.read_bytes()

    def full_disk(self, path, format):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(Image.new("RGB", (4, 4)), target)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]
