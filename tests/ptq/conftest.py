import copy

import pytest


@pytest.fixture
def twin(tiny_pipeline):
    """A second pipeline with the same weights."""
    return copy.deepcopy(tiny_pipeline)
