"""What to draw: classes and prompts of the command line, as one condition a picture."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dite.errors import UsageError

DEFAULT_COUNT = 8


@dataclass(frozen=True)
class Condition:
    """One picture's condition: a class id with its name, or a prompt."""

    value: int | str
    name: str

    @property
    def slug(self) -> str:
        """The name as part of a file name.

        >>> Condition(8, "Ship (large)").slug
        'ship-large'
        """
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:40].strip("-") or "picture"


def conditions(pipe, classes: list[str], prompts: list[str], count: int | None) -> list[Condition]:
    """One condition a picture: those asked for, taking turns until there are `count` (one of each unless given).

    Without any, a class-conditional model draws its classes in order, so that `count` pictures are balanced. Raises UsageError for classes
    the model doesn't have and for prompts where it reads none, UnsupportedModel for a bare transformer.
    """
    from dite.sampling import class_ids, class_names, resolve_conditions, takes_classes

    if takes_classes(pipe):
        if prompts:
            raise UsageError(
                "--prompt can't be used here", f"{type(pipe).__name__} draws classes and reads no text", "use --class NAME or --class ID"
            )
        names = class_names(pipe)
        ids = resolve_conditions(pipe, classes) or class_ids(pipe)[: count or DEFAULT_COUNT]
        asked = [Condition(number, names.get(number, str(number))) for number in ids]
    else:
        if classes:
            raise UsageError(
                "--class can't be used here", f"{type(pipe).__name__} draws from prompts and knows no classes", 'use --prompt "a ship at sea"'
            )
        if not prompts:
            raise UsageError("no --prompt", f"{type(pipe).__name__} draws from prompts", 'for example --prompt "a ship at sea"')
        asked = [Condition(text, text) for text in prompts]
    return [asked[index % len(asked)] for index in range(count or len(asked))]
