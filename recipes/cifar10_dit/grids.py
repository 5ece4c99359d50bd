"""Pictures to look at: a sheet of samples, and pairs of images with their reconstructions."""

from pathlib import Path

import torch
from diffusers import DiTPipeline
from PIL import Image

PER_CLASS = 8
GUIDANCE, STEPS = 2.0, 50
SCALE = 2


def draw_samples(pipe: DiTPipeline, num_classes: int, path: Path, steps: int = STEPS) -> None:
    """A row a class, seeds 0 to 7, enlarged twice."""
    pipe.set_progress_bar_config(disable=True)
    labels = [label for label in range(num_classes) for _ in range(PER_CLASS)]
    generators = [torch.Generator().manual_seed(index % PER_CLASS) for index in range(len(labels))]
    images = pipe(labels, guidance_scale=GUIDANCE, num_inference_steps=steps, generator=generators).images
    _save([images[start : start + PER_CLASS] for start in range(0, len(images), PER_CLASS)], path)


def draw_pairs(images: torch.Tensor, reconstructed: torch.Tensor, path: Path) -> None:
    """uint8 [N, 3, H, W] twice, as two rows."""
    _save([[Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in row] for row in (images, reconstructed)], path)


def _save(rows: list[list[Image.Image]], path: Path) -> None:
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (len(rows[0]) * width, len(rows) * height))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * width, y * height))
    sheet.resize((sheet.width * SCALE, sheet.height * SCALE), Image.NEAREST).save(path)
