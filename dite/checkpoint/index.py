"""What a folder may name: classes of the installed diffusers and transformers, and nothing else.

diffusers takes any library and any class from a pipeline's index, imports it, and runs a file of the folder when one has the library's name.
"""

import math
from pathlib import Path
from typing import Any

from dite.checkpoint.fields import PRIVATE, check_version
from dite.checkpoint.format import PIPELINE
from dite.checkpoint.strict_json import leaves, read_strict
from dite.errors import CheckpointError

LIBRARIES = ("diffusers", "transformers")
MOST = {"diffusers": 2**24, "transformers": 2**24, "scheduler": 100_000}  # whole numbers in a part's configuration; a scheduler makes tables of them
TOKENIZERS = ("Tokenizer", "Processor", "FeatureExtractor")
OTHER = "load it with diffusers, and pass the pipeline to dite"


def check_pipeline(folder: Path, sealed: bool) -> dict[str, tuple[str, str]]:
    """The parts of a pipeline folder: name → (library, class). Raises CheckpointError for an index that names anything else."""
    import diffusers

    index = read_strict(folder / PIPELINE, PIPELINE)
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise CheckpointError(f"{PIPELINE}: _class_name is {name!r}", "it names a pipeline of diffusers; code inside a model is not run", OTHER)
    if not _is_class(getattr(diffusers, name, None), diffusers.DiffusionPipeline):
        raise CheckpointError(f"{PIPELINE}: _class_name is {name!r}", f"diffusers {diffusers.__version__} has no such pipeline", "upgrade diffusers?")
    expected, optional = diffusers.DiffusionPipeline._get_signature_keys(getattr(diffusers, name))
    parts = {}
    for part, value in index.items():
        if isinstance(value, list):
            if len(value) != 2 or not (value == [None, None] or all(isinstance(word, str) for word in value)):
                raise CheckpointError(f"{PIPELINE}: {part} is no part", "a part is [library, class], or [null, null]", OTHER)
            if part in expected and value[0] is not None:
                parts[part] = (value[0], _known_class(part, *value))
        elif part in expected:
            raise CheckpointError(f"{PIPELINE}: {part} is no part", "a part is [library, class], or [null, null]", OTHER)
    known = {*expected, *optional, *PRIVATE, "id2label"}
    unknown = next((key for key in index if key not in known), None)
    if sealed and unknown is not None:
        raise CheckpointError(f"{PIPELINE} has a key {unknown[:80]!r}", f"a {name} takes no such argument", "copy or download the folder again")
    if sealed:
        check_version(index, PIPELINE)
    missing = sorted(set(expected) - set(index) - set(getattr(diffusers, name)._optional_components))
    if missing:
        raise CheckpointError(f"{PIPELINE} lacks {missing[0]}", f"a {name} has this part", "copy or download the folder again")
    _check_labels(index.get("id2label"))
    return parts


def check_values(file: Path, kind: str, name: str) -> dict[str, Any]:
    """The configuration in `file`, if no number in it is beyond what a `kind` of part ever needs. Raises CheckpointError that names the key."""
    values = read_strict(file, name)
    for key, value in leaves({key: value for key, value in values.items() if key != "quantization_config"}):
        if (type(value) is int and abs(value) > MOST[kind]) or (
            isinstance(value, float) and 1e12 < abs(value) < math.inf
        ):  # strict_json has judged inf
            raise CheckpointError(f"{name}: {key} is {value}", f"at most {MOST[kind]} makes sense there", "is the file damaged?")
    return values


def kind_of(library: str, class_name: str) -> str | None:
    """What bounds a part's configuration; None for tokenizers, which hold no sizes that anything is made of."""
    if class_name.endswith("Scheduler"):
        return "scheduler"
    if library == "transformers":
        return None if any(word in class_name for word in TOKENIZERS) else "transformers"
    return "diffusers"


def _known_class(part: str, library: str, class_name: str) -> str:
    """`class_name`, if the library has it."""
    import diffusers

    if library == "transformers":
        import transformers as home
    else:
        home = diffusers if library == "diffusers" else getattr(diffusers.pipelines, library, None) if library.isidentifier() else None
    if home is None:
        raise CheckpointError(f"{PIPELINE}: {part} is from {library!r}", f"parts come from {' and '.join(LIBRARIES)}", OTHER)
    if class_name.startswith("_") or not class_name.isidentifier() or not isinstance(getattr(home, class_name, None), type):
        raise CheckpointError(f"{PIPELINE}: {part} is a {class_name!r}", f"the installed {library} has no such class", "upgrade it?")
    return class_name


def _check_labels(labels: Any) -> None:
    if labels is None:
        return
    sound = isinstance(labels, dict) and all(key.isdecimal() and len(key) < 8 and isinstance(value, str) for key, value in labels.items())
    if not sound:
        raise CheckpointError(f"{PIPELINE}: id2label can't be read", "it maps class numbers to names", "is the file damaged?")


def _is_class(value: Any, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base)
