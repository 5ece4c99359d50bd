"""Pictures as bytes: PNGs that are the same every time, and sheets of them that a person can look at.

Images are uint8 tensors [3, H, W], in stacks [N, 3, H, W].
"""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

GAP_px = 2
LABEL_px = 14
WHITE = 255


def to_png(image: torch.Tensor, metadata: dict[str, Any] | None = None) -> bytes:
    """PNG bytes of one image [3, H, W]; `metadata` goes into its text chunk `dite` as JSON.

    Deterministic: no time, a fixed compression level, sorted keys.
    """
    assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3, (
        f"an image is uint8 [3, H, W], not {image.dtype} {list(image.shape)}"
    )
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        info.add_text("dite", json.dumps(metadata, sort_keys=True))
    buffer = io.BytesIO()
    _to_pil(image).save(buffer, format="PNG", pnginfo=info, compress_level=6)
    return buffer.getvalue()


def read_metadata(png: bytes) -> dict[str, Any] | None:
    """What `to_png` was given, or None."""
    text = Image.open(io.BytesIO(png)).text.get("dite")
    return None if text is None else json.loads(text)


def grid(images: torch.Tensor, columns: int, scale: int = 1) -> torch.Tensor:
    """Images [N, 3, H, W] as one sheet, row by row, each pixel repeated `scale` times (nearest neighbour: nothing is smoothed over).

    >>> grid(torch.zeros(5, 3, 8, 6, dtype=torch.uint8), columns=3, scale=2).shape
    torch.Size([3, 34, 40])
    """
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    height, width = height * scale, width * scale
    sheet = images.new_full((channels, rows * (height + GAP_px) - GAP_px, columns * (width + GAP_px) - GAP_px), WHITE)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + GAP_px), (index % columns) * (width + GAP_px)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def labelled_rows(rows: dict[str, torch.Tensor], scale: int = 1) -> torch.Tensor:
    """One row of images per label, the label above it; column i of every row is the same sample."""
    sheets = {label: grid(images, columns=len(images), scale=scale) for label, images in rows.items()}
    width = max([sheet.shape[2] for sheet in sheets.values()] + [_text_width(label) for label in sheets])
    strips = []
    for label, sheet in sheets.items():
        row = sheet.new_full((3, sheet.shape[1], width), WHITE)
        row[:, :, : sheet.shape[2]] = sheet
        strips += [_label(label, width), row]
    return torch.cat(strips, dim=1)


def difference(a: torch.Tensor, b: torch.Tensor, gain: int = 8) -> torch.Tensor:
    """`gain` times the absolute difference of two stacks of images, clipped: black where they agree."""
    return ((a.int() - b.int()).abs() * gain).clamp(max=255).to(torch.uint8)


def visible_scale(size_px: int, least_px: int = 128) -> int:
    """How many times to repeat the pixels of an image `size_px` high so that it is at least `least_px` high."""
    return max(1, -(-least_px // size_px))


def _label(text: str, width: int) -> torch.Tensor:
    strip = Image.new("RGB", (width, LABEL_px + 8), (WHITE, WHITE, WHITE))
    ImageDraw.Draw(strip).text((4, 3), text, fill=(0, 0, 0), font=ImageFont.load_default(LABEL_px))
    return torch.from_numpy(np.array(strip)).permute(2, 0, 1)


def _text_width(text: str) -> int:
    return int(ImageFont.load_default(LABEL_px).getlength(text)) + 8


def _to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
