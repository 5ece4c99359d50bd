"""All hostile and broken folders, by name; each file beside this one holds those of a sort."""

from tests.checkpoint.hostile import configs, files, headers, manifests, tensors
from tests.checkpoint.hostile.spoil import CASES, Case, reseal, spoiled

SORTS = (files, manifests, headers, tensors, configs)
__all__ = ["CASES", "SORTS", "Case", "reseal", "spoiled"]
