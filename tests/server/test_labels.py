"""What a word means to a model that draws classes."""

import time

import pytest
from fakes import CARD

from dite.server.card import ModelCard
from dite.server.labels import SPELLED, class_id, nearest
from dite.server.problems import Problem


@pytest.mark.parametrize(
    ("wanted", "id_"),
    [(3, 3), ("cat", 3), (" CAT\n", 3), ("tabby cat", 3), ("8", 8), ("class:8", 8), ("Class: ship", 8), ("5", 5), ("class:5", 5)],
)
def test_a_class_is_found_by_its_names_and_by_its_id(wanted, id_):
    assert class_id(wanted, CARD, "prompt") == id_


def test_a_name_goes_before_an_id():
    assert class_id("7", ModelCard("P", reads_text=False, classes={"7": 1}, class_ids=[1, 7]), "prompt") == 1


@pytest.mark.parametrize("wanted", [10, -1, "10", "class:10", "²", "٣", "-1", "1e0", "", "class:", "9" * 4000, "x" * 4000])
def test_what_names_no_class_is_refused(wanted):
    with pytest.raises(Problem) as caught:
        class_id(wanted, CARD, "class_labels")
    problem = caught.value
    assert (problem.status, problem.code, problem.param) == (400, "unknown_class", "class_labels")
    assert len(problem.message) < 500 and problem.message.startswith("class_labels: no class")


def test_an_unknown_id_is_told_which_there_are():
    with pytest.raises(Problem, match="no class has id 10; this model has 10 classes with ids from 0 to 9"):
        class_id(10, CARD, "prompt")


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(Problem, match=r'called "golden retreiver".* the nearest are golden retriever \(7\)'):
        class_id("golden retreiver", CARD, "prompt")


def test_a_word_like_none_is_told_a_few_names():
    with pytest.raises(Problem, match=r"for example airplane \(0\), cat \(3\)"):
        class_id("qqqq", CARD, "prompt")


def test_a_model_without_names_asks_for_an_id():
    with pytest.raises(Problem, match="its classes have no names, give an id"):
        class_id("cat", ModelCard("P", reads_text=False, class_ids=[0, 1]), "prompt")


def test_a_name_inside_a_sentence_is_the_nearest():
    assert nearest("a photo of a golden retriever, 4k", list(CARD.classes))[0] == "golden retriever"
    assert nearest("two ships", list(CARD.classes))[0] == "ship" and nearest("concatenate", ["cat"]) == []


def test_an_unknown_name_is_compared_letter_by_letter_with_few_of_thousands(monkeypatch):
    compared = []
    monkeypatch.setattr("difflib.get_close_matches", lambda text, names, **_: compared.append(len(names)) or [])
    names = [f"{first}{second} retriever {third}" for first in "bcdfg" for second in ("ear", "ird", "oat", "ish") for third in map(str, range(90))]
    nearest("golden retreiver", names)
    assert len(names) == 1800 and compared[0] <= SPELLED


def test_looking_for_near_names_among_thousands_is_quick():
    names = [f"{first}{second} {third}" for first in "bcdfg" for second in ("ear", "ird", "oat", "ish") for third in map(str, range(90))]
    began = time.monotonic()
    nearest("bear ird oat " * 400, names)
    assert time.monotonic() - began < 1
