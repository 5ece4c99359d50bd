"""A model's page on disk: `report.json` for machines, `report.md` for pull requests, `report.html` for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dite.outputs import write_file
from dite_evals.model_report_html import render
from dite_evals.model_schema import ModelDocument
from dite_evals.model_sections import Block, Section, Table, model_facts, sections, tiles_of
from dite_evals.report import check_output


def check_page(folder: Path) -> None:
    """Raise OutputExists unless `folder` is absent, empty, or holds an earlier page of a model; an evaluation's report is never replaced by one."""
    check_output(folder, kinds=("model",))


def write_model_report(document: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write the three files, each renamed into place, `report.json` last; returns their paths by kind."""
    check_page(folder)
    ModelDocument.model_validate(document)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "html": render(document),
        "md": markdown(document),
        "json": json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    paths = {kind: folder / f"report.{kind}" for kind in texts}
    for kind, text in texts.items():
        write_file(paths[kind], text.encode())
    return {kind: str(path) for kind, path in paths.items()}


def markdown(document: dict[str, Any]) -> str:
    """The same figures as tables."""
    lines = [f"# {_cell(document['title'])}", "", *_two_columns(tiles_of(document))]
    for section in sections(document):
        lines += ["", f"## {section.title}", "", section.lead, *_blocks(section)]
    lines += ["", "## The model", "", *_two_columns(model_facts(document))]
    versions = ", ".join(f"{key} {value}" for key, value in document["environment"].items())
    return "\n".join([*lines, "", f"Gathered with: {versions}.", ""])


def _blocks(section: Section) -> list[str]:
    lines = [line for block in section.blocks for line in _block(block)]
    if section.missing:
        what = "The error of each layer was not recorded" if section.blocks else "Not measured"
        lines += ["", f"{what}. To measure it:", "", "```", section.missing, "```"]
    return lines


def _block(block: Block) -> list[str]:
    lines = ["", f"### {_cell(block.title)}"] if block.title else []
    lines += ["", *_two_columns(block.facts)] if block.facts else []
    for table in block.tables:
        lines += ["", *_table(table)]
    lines += ["", block.depends] if block.depends else []
    return lines + (["", "```", block.command, "```"] if block.command else [])


def _table(table: Table) -> list[str]:
    rule = "|" + "".join("---:|" if at >= table.numbers else "---|" for at in range(len(table.columns)))
    rows = [[f"**{cell}**" if index in table.this else cell for cell in map(_cell, row)] for index, row in enumerate(table.rows)]
    return [_row(table.columns), rule, *map(_row, rows)]


def _two_columns(facts: Any) -> list[str]:
    return ["| | |", "|---|---|", *(_row((_cell(name), _cell(value))) for name, value in facts)]


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
