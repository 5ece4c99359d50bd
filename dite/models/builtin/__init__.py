"""The models that ship inside the wheel. `builtin:NAME` is a plain diffusers folder."""

from pathlib import Path

from dite.errors import UsageError

HERE = Path(__file__).parent


def builtin_names() -> list[str]:
    """Names that `builtin:` accepts."""
    return sorted(path.name for path in HERE.iterdir() if (path / "model_index.json").is_file())


def builtin_folder(name: str) -> Path:
    """Where a built-in model lies. Raises UsageError with the known names."""
    if name not in builtin_names():
        raise UsageError(f"no built-in model {name}", f"known: {', '.join(builtin_names()) or 'none'}", "for example builtin:cifar10-dit")
    return HERE / name
