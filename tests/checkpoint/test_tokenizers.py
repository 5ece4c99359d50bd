"""A tokenizer is whole or refused: one without its vocabulary would load, and turn every prompt into `<unk>`."""

import json
import os
import shutil
import sys

import pytest
import transformers

import dite
from dite.checkpoint.format import MANIFEST
from dite.checkpoint.tokenizers import check_tokenizer
from dite.errors import CheckpointError, DiteError, UnsupportedEnvironment
from tests.checkpoint.hostile.spoil import edit, replace_text, reseal
from tests.checkpoint.hostile.watch import deadline
from tests.text.pipelines import PIPELINES

# Before 5, transformers without protobuf blames every error of a tokenizer on that.
REFUSED = CheckpointError if int(transformers.__version__.split(".")[0]) >= 5 else (CheckpointError, UnsupportedEnvironment)
FILE, CONFIG = "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return dite.save(PIPELINES["pixart"](), tmp_path_factory.mktemp("tokenizers") / "saved")


@pytest.fixture(params=["resealed", "unsealed"])
def seal(request):
    return reseal if request.param == "resealed" else lambda folder: (folder / MANIFEST).unlink()


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "q")


DAMAGE = {
    "no vocabulary": (FILE, "missing", lambda folder: (folder / FILE).unlink()),
    "no folder": ("tokenizer", "missing", lambda folder: shutil.rmtree(folder / "tokenizer")),
    "a truncated vocabulary": (FILE, "can't be read", lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-9])),
    "an empty vocabulary": (FILE, "can't be read", lambda folder: (folder / FILE).write_bytes(b"")),
    "a deep vocabulary": (FILE, "nested deeper", lambda folder: (folder / FILE).write_text('{"a":' * 50_000)),
    "a number beyond all": (CONFIG, "no finite number", lambda folder: replace_text(folder / CONFIG, "{", '{"model_max_length": 1e999, ')),
    "a key twice": (CONFIG, "appears twice", lambda folder: replace_text(folder / CONFIG, "{", '{"x": 1, "x": 2, ')),
    "a deep file of no use": ("tokenizer/x.json", "nested deeper", lambda folder: (folder / "tokenizer/x.json").write_text('{"a":' * 50_000)),
    "a vocabulary elsewhere": (CONFIG, "points at", lambda folder: edit(folder / CONFIG, lambda c: c.update(vocab_file="/etc/passwd"))),
    "a vocabulary that is a number": (CONFIG, "points at 0", lambda folder: edit(folder / CONFIG, lambda c: c.update(tokenizer_file=0))),
    "a length of 0": (CONFIG, "number from 1", lambda folder: edit(folder / CONFIG, lambda c: c.update(model_max_length=0))),
    "a length in words": (CONFIG, "number from 1", lambda folder: edit(folder / CONFIG, lambda c: c.update(model_max_length="long"))),
    "two thousand million words more": (CONFIG, "extra_ids is", lambda folder: edit(folder / CONFIG, lambda c: c.update(extra_ids=2**31))),
    "words in words": (CONFIG, "extra_ids is", lambda folder: edit(folder / CONFIG, lambda c: c.update(extra_ids="many"))),
    "a token that is a number": ("tokenizer", "can't be loaded", lambda folder: edit(folder / CONFIG, lambda c: c.update(pad_token=7))),
    "another file's contents": ("tokenizer", "can't be loaded", lambda folder: shutil.copy(folder / CONFIG, folder / FILE)),
    "a version elsewhere": (
        CONFIG, "points at", lambda folder: edit(folder / CONFIG, lambda c: c.update(fast_tokenizer_files=["../../tokenizer.4.0.json"])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_tokenizer_is_refused_by_file(name, folder, seal):
    file, word, damage = DAMAGE[name]
    damage(folder)
    seal(folder)
    with pytest.raises(REFUSED, match=rf"(?s)^{file}.*{word}"):
        dite.load(folder)


@pytest.mark.parametrize("length", [17, 2**31, None])
def test_a_text_is_never_padded_to_more_than_its_clip_reads(length, seal, tmp_path):
    """Pipelines pad to the tokenizer's length: with 2^31, or without one, the first prompt would take all memory."""
    pipe = PIPELINES["sd3"]()
    pipe.tokenizer_2.model_max_length = length or 16
    folder = dite.save(pipe, tmp_path / "q")
    if length is None:
        edit(folder / "tokenizer_2/tokenizer_config.json", lambda config: config.pop("model_max_length"))
    seal(folder)
    loaded = dite.load(folder)
    assert (loaded.tokenizer.model_max_length, loaded.tokenizer_2.model_max_length) == (16, 16)
    assert loaded.tokenizer_3.model_max_length > 1000


def test_a_tokenizer_that_lacks_a_library_says_which(folder, seal, monkeypatch):
    def lacking(*_, **__):
        raise ImportError("\nThis tokenizer requires the sentencepiece library\nsee elsewhere")

    seal(folder)
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "from_pretrained", lacking)
    with pytest.raises(UnsupportedEnvironment, match=r"tokenizer can't be loaded(?s:.*)sentencepiece"):
        dite.load(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="makes a pipe")
def test_a_pipe_among_the_templates_of_a_tokenizer_does_not_hang(folder):
    """transformers opens whatever it finds there."""
    (folder / MANIFEST).unlink()
    (folder / "tokenizer/additional_chat_templates").mkdir()
    os.mkfifo(folder / "tokenizer/additional_chat_templates/.x.jinja")
    with deadline(30), pytest.raises(CheckpointError, match="not a regular file"):
        dite.load(folder)


def test_a_whole_tokenizer_loads_with_or_without_a_manifest(folder, seal):
    named = {"special_tokens_map_file": "/elsewhere/special_tokens_map.json"}
    named |= {"tokenizer_file": "/no/such"} if int(transformers.__version__.split(".")[0]) >= 5 else {}  # which older ones open
    edit(folder / CONFIG, lambda config: config.update(named))
    seal(folder)
    assert dite.load(folder).tokenizer("ab").input_ids == [3, 4, 5, 1]


WHOLE = [
    ("T5Tokenizer", ["tokenizer.json"]),
    ("T5TokenizerFast", ["spiece.model"]),
    ("CLIPTokenizer", ["vocab.json", "merges.txt"]),
    ("Qwen2Tokenizer", ["merges.txt", "tokenizer_config.json", "vocab.json"]),
    ("PreTrainedTokenizerFast", ["tokenizer.json"]),
    ("LlamaTokenizerFast", ["tokenizer.model"]),
    ("ByT5Tokenizer", ["tokenizer_config.json"]),
    ("CLIPImageProcessor", ["preprocessor_config.json"]),
    ("AutoTokenizer", ["vocab.txt"]),
    ("CLIPProcessor", ["tokenizer.json", "preprocessor_config.json"]),
]
PARTIAL = [
    ("T5TokenizerFast", ["vocab.json"], "tokenizer.json, or spiece.model"),
    ("CLIPTokenizer", ["vocab.json"], "vocab.json and merges.txt"),
    ("CLIPTokenizer", ["merges.txt"], "vocab.json and merges.txt"),
    ("PreTrainedTokenizerFast", ["tokenizer_config.json"], "tokenizer.json"),
    ("AutoTokenizer", ["tokenizer_config.json"], "tokenizer.json"),
    ("CLIPProcessor", ["preprocessor_config.json"], "tokenizer.json"),
]


def write(place, files):
    for file in files:
        (place / file).write_text("{}")


@pytest.mark.parametrize(("name", "files"), WHOLE)
def test_either_format_of_a_tokenizer_is_whole(name, files, tmp_path):
    write(tmp_path, files)
    check_tokenizer(tmp_path, "tokenizer", name)


@pytest.mark.parametrize(("name", "files", "wanted"), PARTIAL)
def test_a_part_of_a_format_is_not(name, files, wanted, tmp_path):
    write(tmp_path, files)
    with pytest.raises(CheckpointError, match=rf"(?s)^tokenizer/tokenizer.json is missing.*{wanted}"):
        check_tokenizer(tmp_path, "tokenizer", name)


def test_an_automatic_tokenizer_is_judged_by_the_class_that_its_configuration_names(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    check_tokenizer(tmp_path, "tokenizer", "AutoTokenizer")


def test_a_vocabulary_of_twenty_megabytes_and_any_words_is_read(tmp_path):
    words = {"": 0, "a.b": 1, "-Infinity": 2, "\u2581x" * 10: 3} | {f"word {number} " * 10: number for number in range(4, 180_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}, ensure_ascii=False))
    (tmp_path / "tokenizer_config.json").write_text(f'{{"model_max_length": {10**30}}}')
    assert (tmp_path / "tokenizer.json").stat().st_size > 20e6
    check_tokenizer(tmp_path, "tokenizer", "T5TokenizerFast")


def test_memory_that_runs_out_is_not_the_folders_fault(folder, seal, monkeypatch):
    def starved(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    seal(folder)
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "from_pretrained", starved)
    with pytest.raises(DiteError, match="not enough memory to load") as error:
        dite.load(folder)
    assert not isinstance(error.value, CheckpointError)
