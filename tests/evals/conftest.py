"""A toy extractor, and a pipeline that can be sampled."""

import pytest
import torch


@pytest.fixture
def pipe(tiny_pipeline):
    """The tiny pipeline, by the name these tests use."""
    return tiny_pipeline


@pytest.fixture
def worse_pipe(pipe):
    """The same pipeline with 5% noise on every weight of its transformer."""
    import copy

    worse = copy.deepcopy(pipe)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in worse.transformer.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    return worse


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory):
    """A folder as the built-in model's: `classifier/`, `statistics.safetensors`, and a config.json so that it counts as a model."""
    from dite_evals.classifier import SmallClassifier
    from dite_evals.extractors import load_classifier, save_classifier
    from dite_evals.statistics import compute_statistics, write_statistics

    folder = tmp_path_factory.mktemp("reference")
    torch.manual_seed(0)
    save_classifier(SmallClassifier(), folder, "toy", 32)
    (folder / "config.json").write_text("{}")
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    write_statistics(folder / "statistics.safetensors", compute_statistics(load_classifier(folder), images, "noise"))
    return folder


@pytest.fixture
def extractor(reference_folder):
    from dite_evals.extractors import load_classifier

    return load_classifier(reference_folder)


@pytest.fixture
def smoke(reference_folder):
    """A FID protocol of a few seconds."""
    return {
        "name": "tiny",
        "kind": "fid",
        "n": 12,
        "steps": 2,
        "guidance": 1.5,
        "micro_batch": 4,
        "allow_few": True,
        "extractor": str(reference_folder),
        "statistics": str(reference_folder),
    }
