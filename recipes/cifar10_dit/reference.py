"""Reference statistics of the training data under the trained classifier: what an FID of the built-in model is measured against."""

from pathlib import Path

import torch

from dite_evals.extractors import Extractor
from dite_evals.statistics import compute_statistics
from dite_evals.statistics import write_statistics as write

STATISTICS = "statistics.safetensors"


def write_statistics(classifier: Extractor, images: torch.Tensor, path: Path, data_name: str, device: torch.device | str = "cpu") -> None:
    """Write the feature moments of `images` uint8 [N, 3, 32, 32].

    `classifier` is the exported one, read back with `dite_evals.extractors.load_classifier(folder)`: its id holds the hash of the very file
    that will be compared with these statistics later.
    """
    write(path, compute_statistics(classifier, images, data_name, device))
