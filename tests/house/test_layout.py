"""The shape of the tree, and what no source may do."""

import ast
import os
import re
import subprocess
import sys

import pytest

MOST_LINES = 450
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_NAMES = {  # whatever they are called as: found by where a name comes from
    *("eval", "exec", "__import__", "torch.load", "torch.hub.load", "torch.jit.load", "numpy.load", "os.system", "os.popen"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "pandas.read_pickle", "builtins.eval", "builtins.exec"),
}
ONLY_READER_OF_PICKLES = "dite/checkpoint/pickle_reader.py"  # weights_only, in a process of its own, within limits
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


def unsafe_in(tree: ast.Module) -> list[str]:
    """What a module uses that runs code out of files, strings or shells, under whatever name it imported it."""
    origins, found = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno} imports {alias.name}" for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES]
            origins |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [f"{node.lineno} imports {node.module}"] if node.module.split(".")[0] in UNSAFE_MODULES else []
            origins |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found += [f"{node.lineno} imports {name}" for alias in node.names if (name := f"{node.module}.{alias.name}") in UNSAFE_NAMES]
    own = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and not (isinstance(node, ast.Name) and node.id in own):
            first, _, rest = ast.unparse(node).partition(".")
            name = origins.get(first, first) + (f".{rest}" if rest else "")
            found += [f"{node.lineno} uses {name}"] if name in UNSAFE_NAMES else []
        if isinstance(node, ast.Call):
            given = {keyword.arg: getattr(keyword.value, "value", ...) for keyword in node.keywords}
            found += [f"{node.lineno} starts a shell"] if given.get("shell", False) is not False else []
            found += [f"{node.lineno} trusts remote code"] if given.get("trust_remote_code", False) is not False else []
            found += [f"{node.lineno} lets pickles in"] if given.get("allow_pickle", False) is not False else []
            found += [f"{node.lineno} takes more than weights"] if given.get("weights_only", True) is not True else []
    return found


def test_no_source_runs_what_a_file_or_a_user_wrote(trees):
    unsafe = {path: found for path, tree in trees.items() if (found := unsafe_in(tree))}
    loads = unsafe.pop(ONLY_READER_OF_PICKLES, [])
    assert unsafe == {}
    assert [line.split(" ", 1)[1] for line in loads] in ([], ["uses torch.load"])


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch as t\nt.load('x')",
        "from torch import load as fetch\nfetch('x')",
        "eval('1')",
        "f = exec",
        "import yaml\nyaml.load('x', Loader=yaml.Loader)",
        "from yaml import unsafe_load",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import os\nos.system('ls')",
        "import numpy as np\nnp.load('x')",
        "g('x', allow_pickle=True)",
        "g('x', weights_only=False)",
        "g('x', trust_remote_code=flag)",
        "import builtins\nbuiltins.eval('1')",
        "__import__('pickle')",
    ],
)
def test_what_runs_code_is_found_under_any_name(source):
    assert unsafe_in(ast.parse(source))


@pytest.mark.parametrize(
    "source", ["import yaml\nyaml.safe_load('x')", "model.eval()", "import re\nre.compile('x')", "json.load(f)", "g(shell=False)"]
)
def test_what_only_sounds_alike_is_let_be(source):
    assert unsafe_in(ast.parse(source)) == []


def test_no_file_names_a_path_of_somebodys_machine(texts):
    assert [path for path, text in texts.items() if MACHINE_PATH.search(text)] == []


def test_every_test_file_asserts_something(texts):
    tests = {path: text for path, text in texts.items() if path.startswith("tests/") and path.rsplit("/", 1)[-1].startswith("test_")}
    assert [path for path, text in tests.items() if not re.search(r"\bassert|raises\(", text)] == []
