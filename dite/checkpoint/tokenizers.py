"""Is a tokenizer whole? One without its vocabulary loads all the same, and turns every prompt into `<unk>`, without a word.

transformers reads several files for one tokenizer, whichever are there: `tokenizer.json`, or the files of the older format (`spiece.model`; or
`vocab.json` and `merges.txt`). Its own JSON reader takes the last of two equal keys; and what it opens can be named by `tokenizer_config.json`.
"""

import os
from pathlib import Path
from typing import Any

from dite.checkpoint.header import visible
from dite.checkpoint.strict_json import read_strict
from dite.errors import CheckpointError

MAX_TOKENIZER_BYTES = 128_000_000  # T5's has 2 million, Qwen's 11, Gemma's 34
MAX_EXTRA = 10_000  # T5 has 100
WHOLE = "tokenizer.json"
ANYBODYS = ("tokenizer.model", "tekken.json", "tiktoken.model")  # transformers takes these where the class's own files are missing
USUAL = (("vocab.json", "merges.txt"), ("vocab.txt",), ("spiece.model",), ("sentencepiece.bpe.model",), ("spm.model",))
NEVER_OPENED = {"tokenizer_config_file", "special_tokens_map_file", "added_tokens_file"}  # when a configuration names them
NOT_VOCABULARY = NEVER_OPENED | {"tokenizer_file", "normalizer_file"}
INCOMPLETE = "copy or download the folder again"


def check_tokenizer(place: Path, part: str, class_name: str) -> None:
    """Check the part of a pipeline in `place`, a tokenizer or processor of transformers. Raises CheckpointError that names the file."""
    if not place.is_dir():
        raise CheckpointError(f"{part} is missing", f"model_index.json names the part {part}", INCOMPLETE)
    config: dict[str, Any] = {}
    for file in visible(place, "*.json"):
        values = read_strict(file, f"{part}/{file.name}", MAX_TOKENIZER_BYTES)
        if file.name == "tokenizer_config.json":
            config = values
    wanted = _vocabularies(class_name, config)
    if wanted and not any(all((place / name).is_file() for name in names) for names in wanted):
        either = ", or ".join(" and ".join(names) for names in wanted)
        raise CheckpointError(f"{part}/{wanted[0][0]} is missing", f"a {class_name} has its vocabulary in {either}", INCOMPLETE)
    _check_names(config, f"{part}/tokenizer_config.json")
    _check_numbers(config, f"{part}/tokenizer_config.json")


def load_tokenizer(place: Path, class_name: str, positions: int | None) -> Any:
    """The tokenizer or processor in `place`, as diffusers would load it; None for another class. Raises what transformers raises.

    `positions`: how many tokens its text encoder has places for, if that is a fixed number. No text may be longer: most pipelines pad every prompt to
    the tokenizer's length, and a tokenizer whose file says none has one of 10^30.
    """
    import transformers

    kinds = ("PreTrainedTokenizerBase", "ProcessorMixin", "ImageProcessingMixin", "FeatureExtractionMixin")
    cls = getattr(transformers, class_name, None) if class_name.isidentifier() else None
    if not isinstance(cls, type) or not issubclass(cls, tuple(getattr(transformers, kind) for kind in kinds)):
        return None
    tokenizer = cls.from_pretrained(place, local_files_only=True)
    if positions is not None and getattr(tokenizer, "model_max_length", 0) > positions:
        tokenizer.model_max_length = positions
    return tokenizer


def _vocabularies(class_name: str, config: dict[str, Any]) -> list[tuple[str, ...]]:
    """The sets of files of which a `class_name` needs one; none where it has no vocabulary (bytes, pictures)."""
    names = _own_names(class_name)
    if names is None and _holds_tokenizer(class_name):  # the folder says what it holds
        names = _own_names(str(config.get("tokenizer_class")))
        if names is None:
            return [(WHOLE,), *((name,) for name in ANYBODYS), *USUAL]
    if not names:
        return []
    old = tuple(sorted((name for key, name in names.items() if key not in NOT_VOCABULARY), reverse=True))
    return [(WHOLE,), *([old] if old else []), *((name,) for name in ANYBODYS if (name,) != old)]


def _own_names(class_name: str) -> dict[str, str] | None:
    """The files that a tokenizer class reads, by argument; None for what is no tokenizer class, or lacks a library here (and won't load)."""
    import transformers

    try:
        cls = getattr(transformers, class_name, None) if class_name.isidentifier() else None
        return cls.vocab_files_names if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedTokenizerBase) else None
    except ImportError:
        return None


def _holds_tokenizer(class_name: str) -> bool:
    """Whether a class that is no tokenizer loads one from its own folder."""
    import transformers

    cls = getattr(transformers, class_name, None)
    if class_name == "AutoTokenizer" or not isinstance(cls, type) or not issubclass(cls, transformers.ProcessorMixin):
        return class_name == "AutoTokenizer"
    return "tokenizer" in (cls.get_attributes() if hasattr(cls, "get_attributes") else cls.attributes)


def _check_names(config: dict[str, Any], label: str) -> None:
    """Raise CheckpointError if a configuration names files to open: transformers opens any name in `fast_tokenizer_files`, and before 5 any path.

    Paths of the machine that wrote the file are common there, and do no harm where there is no such file.
    """
    named = [value for key, value in config.items() if key.endswith("_file") and key not in NEVER_OPENED and value is not None]
    versions = config.get("fast_tokenizer_files") or []
    versions = versions if isinstance(versions, list) else [versions]
    outside = [one for one in named if not isinstance(one, str) or os.path.lexists(one)]
    outside += [one for one in versions if not isinstance(one, str) or Path(one).name != one or one.startswith(".")]
    if outside:
        raise CheckpointError(f"{label} points at {outside[0]!r}", "a tokenizer's files lie in its own folder", "don't load this folder")


def _check_numbers(config: dict[str, Any], label: str) -> None:
    """Raise CheckpointError for a length that no text has, and for more words made up (`extra_ids`, of T5) than any model has."""
    length, extra = config.get("model_max_length"), config.get("extra_ids") or 0
    if length is not None and (type(length) not in (int, float) or length < 1):
        raise CheckpointError(f"{label}: model_max_length is {str(length)[:40]!r}", "it is a number from 1", INCOMPLETE)
    if type(extra) is not int or not 0 <= extra <= MAX_EXTRA:
        raise CheckpointError(f"{label}: extra_ids is {str(extra)[:40]!r}", f"it is a whole number from 0 to {MAX_EXTRA}", INCOMPLETE)
