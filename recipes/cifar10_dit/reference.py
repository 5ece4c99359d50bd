"""Reference statistics of the training data under the trained classifier: what an FID of the built-in model is measured against."""

from pathlib import Path

import torch

from dite_evals.classifier import SmallClassifier
from dite_evals.extractors import Extractor, load_classifier
from dite_evals.fid import fid_of_images
from dite_evals.statistics import compute_statistics, read_statistics
from dite_evals.statistics import write_statistics as write

KEPT = 2000  # images whose features are kept, for KID, precision and recall


def write_statistics(classifier: SmallClassifier, images: torch.Tensor, path: Path, data_name: str) -> None:
    """Write the feature moments of `images` uint8 [N, 3, 32, 32], and the features of some, to `path`, beside the exported `classifier/`."""
    extractor, device = _exported(classifier, path)
    write(path, compute_statistics(extractor, images, data_name, device, keep=min(KEPT, len(images))))


def image_fid(classifier: SmallClassifier, images: torch.Tensor, path: Path) -> float:
    """FID of `images` uint8 [N, 3, 32, 32] against the statistics at `path`."""
    extractor, device = _exported(classifier, path)
    return fid_of_images(extractor, images, read_statistics(path), device)


def _exported(classifier: SmallClassifier, path: Path) -> tuple[Extractor, torch.device]:
    """The classifier as it was exported beside `path`: an extractor's identity is the hash of its file, so memory alone won't do."""
    extractor = load_classifier(path.parent)
    stored = extractor.network.state_dict()
    for key, value in classifier.state_dict().items():
        if not torch.equal(stored[key], value.float().cpu()):
            raise ValueError(f"{path.parent / 'classifier'} holds other weights than the classifier given: {key} differs; export it first")
    return extractor, next(classifier.parameters()).device
