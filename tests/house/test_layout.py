"""The shape of the tree, and what no source may do."""

import ast
import os
import re
import subprocess
import sys

import pytest

MOST_LINES = 450
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "numpy.load", "np.load"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(work|root|farm|Users)/|(?<![\w.])/home/\w")


@pytest.mark.parametrize("folder", ["kernels", "evals", "recipes", "tests"])
def test_a_folder_that_is_no_package_stays_none(root, folder):
    assert not (root / folder / "__init__.py").exists(), f"{folder}/__init__.py would shadow the installed package of that name"
    assert not list((root / "tests").rglob("__init__.py"))


def test_an_installed_package_named_kernels_wins_from_our_root(root, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'the installed one'")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "import kernels; print(kernels.whose)"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "the installed one", done.stderr


def test_no_file_is_too_long_to_hold_one_idea(texts):
    long = {path: text.count("\n") for path, text in texts.items() if path.endswith(".py") and text.count("\n") > MOST_LINES}
    assert long == {}


def test_no_file_has_a_name_that_says_nothing(texts):
    assert [path for path in texts if path.rsplit("/", 1)[-1] in ("utils.py", "helpers.py", "common.py", "misc.py")] == []


def test_no_source_runs_what_a_file_or_a_user_wrote(trees):
    unsafe = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                unsafe += [f"{path}:{node.lineno} imports {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES]
            if isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE_CALLS:
                unsafe.append(f"{path}:{node.lineno} calls {ast.unparse(node.func)}")
    assert unsafe == []


def test_no_file_names_a_path_of_somebodys_machine(texts):
    assert [path for path, text in texts.items() if MACHINE_PATH.search(text)] == []


def test_every_test_file_asserts_something(texts):
    tests = {path: text for path, text in texts.items() if path.startswith("tests/") and path.rsplit("/", 1)[-1].startswith("test_")}
    assert [path for path, text in tests.items() if not re.search(r"\bassert|raises\(", text)] == []
