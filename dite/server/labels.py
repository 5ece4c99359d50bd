"""Classes by name or number: what a prompt means to a model that reads no text."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from functools import lru_cache

from dite.server.card import ModelCard
from dite.server.problems import Problem

NEAREST = 5
COMPARED_CHARS = 64  # of what was asked for; class names are shorter
ALIKE = 0.55
SPELLED = 60  # names that share the most pairs of letters: these alone are compared letter by letter


def class_id(wanted: int | str, card: ModelCard, param: str) -> int:
    """The class that `wanted` names: its exact name in any case, its id, or either after "class:".

    Raises Problem 400 with the nearest names; `param` is the field of the request that it came from.
    """
    if isinstance(wanted, int):
        number: int | None = wanted
    else:
        names = {name.casefold(): number for name, number in card.classes.items()}
        text = wanted.strip().casefold()
        for name in (text, text.removeprefix("class:").strip()):
            if name in names:
                return names[name]
        number = int(name) if re.fullmatch(r"[0-9]{1,9}", name) else None
    if number in card.class_ids:
        return number
    raise Problem(400, "unknown_class", f"{param}: {_unknown(wanted, number, card)}", param=param)


def nearest(text: str, names: list[str]) -> list[str]:
    """Names that `text` may mean, the likeliest first: those that stand in it word for word, then those that share a word or are spelled alike.

    >>> nearest("a photo of a Golden Retriever", ["cat", "golden retriever", "flat-coated retriever", "truck"])
    ['golden retriever', 'flat-coated retriever']
    """
    text = text.casefold()[:COMPARED_CHARS]
    index = _index(tuple(names))
    words = {word for word in _words(text) if len(word) > 2}
    sentence = f" {' '.join(_words(text))} "
    shared = Counter(name for word in words for name in index.by_word.get(word, ()))
    inside = [name for name in shared if f" {' '.join(_words(name))} " in sentence]
    inside += [name for name in index.short if f" {' '.join(_words(name))} " in sentence]
    sharing = sorted(shared, key=lambda name: (-shared[name], index.folded[name][0]))
    pairs = Counter(name for pair in _pairs(text) for name in index.by_pair.get(pair, ()))
    alike = difflib.get_close_matches(text, [name for name, _ in pairs.most_common(SPELLED)], n=NEAREST, cutoff=ALIKE)
    likeliest = [*sorted(inside, key=len, reverse=True), *alike[:1], *sharing, *alike[1:]]
    return [index.folded[name][1] for name in dict.fromkeys(likeliest)][:NEAREST]


class _Index:
    """Names by what they are made of: thousands of them can't be compared letter by letter while everybody else waits."""

    def __init__(self, names: tuple[str, ...]):
        self.folded = {name.casefold(): (place, name) for place, name in enumerate(names)}
        self.by_word: dict[str, list[str]] = {}
        self.by_pair: dict[str, list[str]] = {}
        self.short = [name for name in self.folded if _words(name) and all(len(word) <= 2 for word in _words(name))]
        for name in self.folded:
            for word in dict.fromkeys(_words(name)):
                self.by_word.setdefault(word, []).append(name)
            for pair in _pairs(name):
                self.by_pair.setdefault(pair, []).append(name)


@lru_cache(maxsize=4)
def _index(names: tuple[str, ...]) -> _Index:
    return _Index(names)


def _pairs(text: str) -> set[str]:
    return {text[at : at + 2] for at in range(len(text) - 1)}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _unknown(wanted: int | str, number: int | None, card: ModelCard) -> str:
    if number is not None:
        ids = card.class_ids
        span = f"ids from {min(ids)} to {max(ids)}" if ids else "no ids"
        return f"no class has id {number}; this model has {len(ids)} classes with {span}"
    asked = f"{wanted[:COMPARED_CHARS]}..." if len(str(wanted)) > COMPARED_CHARS else wanted
    close = nearest(str(wanted), list(card.classes))
    known = close or list(card.classes)[:NEAREST]
    listed = ", ".join(f"{name} ({card.classes[name]})" for name in known)
    shown = f'no class is called "{asked}"; this model draws {len(card.class_ids)} classes and reads no other text'
    if not known:
        return f"{shown}; its classes have no names, give an id"
    return f"{shown}; {'the nearest are' if close else 'for example'} {listed}"
