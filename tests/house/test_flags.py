"""A ratchet: scripts rely on the flags, so a flag comes, goes or changes its name only on purpose.

After a change on purpose: `DITE_UPDATE_FLAGS=1 python -m pytest tests/house/test_flags.py`, and say so in CHANGELOG.md.
"""

import json
import os
from pathlib import Path

from typer.main import get_command

FROZEN = Path(__file__).with_name("flags.json")
EVERYWHERE = {"--json", "--no-progress", "--verbose", "-v"}


def flags() -> dict[str, list[str]]:
    """Command → its arguments and flags, groups entered."""
    from dite.cli.app import app

    found: dict[str, list[str]] = {}

    def enter(command, path: str) -> None:
        found[path] = sorted(word for parameter in command.params for word in (*parameter.opts, *parameter.secondary_opts))
        for name, child in getattr(command, "commands", {}).items():
            enter(child, f"{path} {name}")

    enter(get_command(app), "dite")
    return dict(sorted(found.items()))


def test_the_flags_are_the_frozen_ones():
    current = flags()
    if os.environ.get("DITE_UPDATE_FLAGS"):
        FROZEN.write_text(json.dumps(current, indent=1) + "\n")
    assert current == json.loads(FROZEN.read_text()), "a flag changed; if on purpose: DITE_UPDATE_FLAGS=1 python -m pytest tests/house/test_flags.py"


def test_every_command_has_the_flags_that_every_command_has():
    leaves = {path: set(words) for path, words in flags().items() if not any(other.startswith(path + " ") for other in flags())}
    assert {path: EVERYWHERE - words for path, words in leaves.items() if not words >= EVERYWHERE} == {}
