"""Grids of pictures side by side, each under its caption, in one PNG.

Shapes: B pictures, Y rows, X columns, C channels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_INK, _PAPER, _FAINT = (20, 24, 32), (250, 250, 248), (110, 116, 128)
_MARGIN, _CAPTION = 18, 44


def grid(pictures: np.ndarray, columns: int, scale: int) -> Image.Image:
    """Pictures (B, Y, X) or (B, Y, X, C) in [0, 1], row by row, each enlarged ``scale`` times, a pixel apart."""
    levels = np.round(np.clip(pictures, 0.0, 1.0) * 255).astype(np.uint8)
    height, width = levels.shape[1:3]
    rows = math.ceil(len(levels) / columns)
    across, down = (width + 1) * scale, (height + 1) * scale
    sheet = Image.new("RGB", (columns * across - scale, rows * down - scale), _PAPER)
    for index, picture in enumerate(levels):
        tile = Image.fromarray(picture).convert("RGB").resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (index % columns * across, index // columns * down))
    return sheet


def side_by_side(grids: Sequence[tuple[str, str, Image.Image]], across: int = 3) -> Image.Image:
    """One sheet of (title, small print, grid), ``across`` in a row."""
    across = max(1, min(across, len(grids)))
    width = max(image.width for *_, image in grids) + _MARGIN
    height = max(image.height for *_, image in grids) + _CAPTION + _MARGIN
    sheet = Image.new("RGB", (across * width + _MARGIN, math.ceil(len(grids) / across) * height + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (title, small, image) in enumerate(grids):
        x, y = _MARGIN + index % across * width, _MARGIN + index // across * height
        pen.text((x, y), title, fill=_INK, font=ImageFont.load_default(18))
        pen.text((x, y + 22), small, fill=_FAINT, font=ImageFont.load_default(13))
        sheet.paste(image, (x, y + _CAPTION))
    return sheet


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG beside the target, then swap: a full disk or a killed process leaves the old one whole."""
    partial = path.with_name(path.name + ".partial")
    try:
        image.save(partial, format="PNG")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
