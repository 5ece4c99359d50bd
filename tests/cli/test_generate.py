"""`dite generate`: files, names, metadata, comparisons, and what is refused."""

import json

import pytest

from dite.pictures import read_metadata

FAST = ("--steps", 2, "--json")


@pytest.fixture
def generate(run, model_folder, tmp_path):
    """Run `dite generate` on the tiny model into tmp/pictures."""
    return lambda *arguments: run("generate", model_folder, "-o", tmp_path / "pictures", *FAST, *arguments)


def test_pictures_are_named_by_index_class_and_seed(generate):
    document = generate("--class", "ship", "-n", 2, "--seed", 5).document
    assert [path.rsplit("/", 1)[1] for path in document["images"]] == ["0000-ship-seed5.png", "0001-ship-seed6.png"]
    assert (document["seeds"], document["class_labels"], document["exchange"]) == ([5, 6], [8, 8], None)
    assert document["seconds"] > 0 and document["seconds_per_step"] > 0


def test_a_class_is_given_by_name_or_by_id(generate):
    assert generate("--class", "Ship", "--class", "3", "-n", 3).document["class_labels"] == [8, 3, 8]


def test_without_a_class_the_classes_come_in_order(generate):
    assert generate("-n", 3).document["class_labels"] == [0, 1, 2]


def test_each_picture_carries_what_is_needed_to_make_it_again(generate, tmp_path):
    (path,) = generate("--class", "cat", "--seed", 7, "--guidance", 1.5).document["images"]
    facts = read_metadata((tmp_path / path).read_bytes())
    assert (facts["class"], facts["class_name"], facts["seed"], facts["steps"], facts["guidance"]) == (3, "cat", 7, 2, 1.5)
    assert {"model", "dtype", "version", "index"} <= facts.keys()
    assert json.loads((tmp_path / "pictures" / "metadata.json").read_text())["images"] == [{"file": "0000-cat-seed7.png"} | facts]


def test_the_same_command_writes_the_same_bytes(generate, tmp_path):
    (path,) = generate("--class", "cat").document["images"]
    first = (tmp_path / path).read_bytes()
    generate("--class", "cat", "--overwrite")
    assert (tmp_path / path).read_bytes() == first


def test_a_model_compared_with_itself_shows_no_difference(generate, model_folder, tmp_path):
    document = generate("-n", 2, "--compare", model_folder).document
    assert document["compare"] == str(tmp_path / "pictures" / "compare.png")
    assert (tmp_path / "pictures" / "compare.png").exists()


def test_a_grid_is_always_written(generate, tmp_path):
    assert generate("-n", 1).document["grid"] == str(tmp_path / "pictures" / "grid.png")


@pytest.mark.parametrize(("arguments", "words"), [(("--class", "shp"), "ship"), (("--class", "77"), "class 77"), (("--prompt", "a ship"), "--class")])
def test_what_the_model_cannot_draw_is_answered_with_what_it_can(generate, arguments, words):
    outcome = generate(*arguments)
    assert outcome.code == 2 and outcome.document["error"]["type"] == "UsageError"
    assert words in json.dumps(outcome.document["error"])


def test_pictures_are_not_written_over_others_unless_told(generate):
    generate("-n", 1)
    outcome = generate("-n", 1)
    assert outcome.code == 2 and outcome.document["error"]["type"] == "OutputExists"


def test_overwriting_removes_old_pictures_and_nothing_else(generate, tmp_path):
    generate("-n", 3)
    (tmp_path / "pictures" / "mine.txt").write_text("keep me")
    generate("-n", 1, "--class", "dog", "--overwrite")
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["0000-dog-seed0.png", "grid.png", "metadata.json", "mine.txt"]


def test_a_dry_run_names_the_files_and_writes_none(generate, tmp_path):
    document = generate("-n", 2, "--dry-run").document
    assert document["dry_run"] is True and len(document["images"]) == 2
    assert not (tmp_path / "pictures").exists()


def test_a_bare_transformer_cannot_draw(run, model_folder, tmp_path):
    outcome = run("generate", model_folder / "transformer", "-o", tmp_path / "pictures", *FAST)
    assert outcome.code == 3 and outcome.document["error"]["type"] == "UnsupportedModel"


def test_a_missing_model_is_a_usage_error(run, tmp_path):
    assert run("generate", tmp_path / "nowhere", "-o", tmp_path / "pictures", "--json").code == 2
