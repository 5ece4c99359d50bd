"""Every transformer class of the installed diffusers, small: found, quantized, saved, loaded bit for bit, and dequantized."""

import json
from pathlib import Path

import diffusers
import pytest

from dite_evals.every_transformer import every_class, small_model
from dite_evals.model_support import WORKS, page, whole_life

CLASSES = every_class()
DOCS = Path(__file__).parents[2] / "docs"
TABLE = json.loads((DOCS / "results/model-support.json").read_text())
SAME_VERSION = TABLE["diffusers"] == diffusers.__version__


@pytest.mark.parametrize("name", CLASSES)
def test_4_bits_through_a_whole_life(name):
    if not SAME_VERSION and name not in {row["class"] for row in TABLE["rows"]}:
        pytest.skip("a class of another version of diffusers than the table's")
    assert whole_life(small_model(CLASSES[name]), "w4a8") == WORKS


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_8_bits_through_a_whole_life(name):
    assert whole_life(small_model(CLASSES[name]), "w8a8") == WORKS


@pytest.mark.skipif(not SAME_VERSION, reason=f"the table is of diffusers {TABLE['diffusers']}")
def test_the_published_table_has_every_class_and_says_what_it_says():
    assert [row["class"] for row in TABLE["rows"]] == list(CLASSES) and TABLE["classes"] == len(CLASSES)
    assert TABLE["work"] == sum(row.get("w4a8") == row.get("w8a8") == WORKS for row in TABLE["rows"])
    assert (DOCS / "models.md").read_text() == page(TABLE)
