"""What every page of ours is built of: one file, one style sheet inside it, no script, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib import resources

LONG_VALUE = 14


def page(title: str, body: str) -> str:
    """A whole HTML document. `title` is escaped here, `body` is HTML already."""
    style = resources.files("dite_evals").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{body}</main></body></html>\n"
    )


def tiles(facts: Iterable[tuple[str, str]]) -> str:
    """The figures one looks for first, as (name, value), in a row of cards."""
    cards = "".join(
        f'<div class="tile{" long" if len(value) > LONG_VALUE else ""}"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in facts
    )
    return f'<div class="tiles">{cards}</div>'


def figure(inner: str, caption: str) -> str:
    """A drawing on a card, with its caption."""
    return f'<figure class="plot">{inner}<figcaption>{escape(caption)}</figcaption></figure>'
