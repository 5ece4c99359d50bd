"""The project's own files, as the tests of this folder read them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("dite", "kernels", "evals", "recipes")


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def trees() -> dict[str, ast.Module]:
    """Every Python source (tests aside) by its path from the root, parsed."""
    paths = sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


@pytest.fixture(scope="session")
def texts() -> dict[str, str]:
    """Everything a person wrote: sources, tests, documents, configuration, by path from the root."""
    kinds = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".sh", ".html", ".css", ".js"}
    paths = [path for folder in (*SOURCES, "tests", "docs", ".ci") for path in (ROOT / folder).rglob("*") if path.is_file()]
    paths += [path for path in ROOT.iterdir() if path.is_file()]
    wanted = [path for path in paths if path.suffix in kinds or path.name in ("Makefile", "run")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(wanted)}
