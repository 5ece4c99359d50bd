"""`run("quantize", ...)` calls the command line in this process and gives back its exit code, stdout and stderr."""

import json
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict:
        """stdout as the one JSON document that it must be."""
        return json.loads(self.out)


@pytest.fixture
def run(capsys):
    from dite.cli import main

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def model_folder(tiny_pipeline, tmp_path):
    """The tiny pipeline as a plain diffusers folder, class names included."""
    return _saved(tiny_pipeline, tmp_path / "tiny")


@pytest.fixture(scope="module")
def model_folder_once(make_tiny_pipeline, tmp_path_factory):
    """The same, for all tests of a module that only read it."""
    return _saved(make_tiny_pipeline(), tmp_path_factory.mktemp("model") / "tiny")


def _saved(pipe, folder):
    pipe.save_pretrained(folder)
    index = folder / "model_index.json"
    names = {number: name for name, number in pipe.labels.items()}
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": names}))
    return folder
