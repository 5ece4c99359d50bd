"""Imports run one way, downstairs:

    cli → server, ptq → parallel, models, checkpoint → quant → dite_kernels

so that a lower room can be read, tested and used without the rooms above it.
"""

import ast
from collections.abc import Iterator

import dite

FLOOR = {
    **dict.fromkeys(("cli", "__main__"), 0),
    **dict.fromkeys(("server", "ptq", "evaluation", "pipeline"), 1),
    **dict.fromkeys(("parallel", "models", "checkpoint", "sampling"), 2),
    **dict.fromkeys(("quant", "recipe"), 3),
    **dict.fromkeys(("pictures", "errors", "outputs"), 4),
}
# What dite_evals may use, and all that lies in dite.parallel.
PUBLIC = {"dite", "dite.errors", "dite.outputs", "dite.pictures", "dite.recipe", "dite.sampling"}
# The first two measure parts of the quantizer that the public API offers only as a whole; ranks load bare models and their inputs.
INSIDERS = {"evals/methods_table.py", "evals/search_rank.py", "evals/dite_evals/exchange_ranks.py", "evals/dite_evals/model_support.py"}
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "numpy", "PIL", "safetensors", "triton", "torchmetrics", "dite_kernels", "dite_evals"}


def room(module: str) -> str:
    """`dite.quant.affine` lies in `quant`; `dite.save` is a function, and lies where its home is."""
    name = module.split(".")[1]
    return dite._HOMES[name].split(".")[1] if name in dite._HOMES else name


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that a tree imports, at any depth; for `import dite`, also `dite.<name>` for each name used."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((f"dite.{alias.name}" for alias in node.names) if node.module == "dite" else [node.module])
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dite" and node.attr in dite._HOMES:
            yield f"dite.{node.attr}"


def when_loaded(tree: ast.Module) -> Iterator[str]:
    """Modules imported as soon as this one is: neither inside functions nor under TYPE_CHECKING."""

    def visit(node: ast.AST) -> Iterator[str]:
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)
        if not lazy:
            for child in ast.iter_child_nodes(node):
                yield from visit(child)

    return visit(tree)


def package(module: str) -> str:
    return module.split(".")[0]


def test_every_room_has_a_floor(root):
    names = {path.stem for path in (root / "dite").iterdir() if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))}
    assert names - {"__init__"} <= FLOOR.keys(), "a new room: give it a floor in FLOOR"


def test_no_room_imports_from_a_floor_above_it(trees):
    upstairs = [
        f"{path} imports {module}"
        for path, tree in trees.items()
        if path.startswith("dite/") and path != "dite/__init__.py"
        for module in imported(tree)
        if package(module) == "dite" and module.count(".") and room(module) != "__version__"
        if FLOOR[room(module)] < FLOOR[room(path.removesuffix(".py").replace("/", "."))]
    ]
    assert upstairs == []


def test_the_kernels_import_nothing_of_ours(trees):
    ours = [
        f"{path} imports {module}"
        for path, tree in trees.items()
        if path.startswith("kernels/")
        for module in imported(tree)
        if package(module) in ("dite", "dite_evals")
    ]
    assert ours == []


def test_the_evals_use_only_the_public_api(trees):
    private = [
        f"{path} imports {module}"
        for path, tree in trees.items()
        if path.startswith("evals/") and path not in INSIDERS
        for module in imported(tree)
        if package(module) == "dite" and not module.startswith("dite.parallel.")
        if module not in PUBLIC | {f"dite.{name}" for name in dite.__all__}
    ]
    assert private == []


def test_dite_reaches_the_evals_lazily_and_from_two_places_only(trees):
    inside = {path: tree for path, tree in trees.items() if path.startswith("dite/")}
    users = {path for path, tree in inside.items() if "dite_evals" in map(package, imported(tree))}
    assert all(path.startswith("dite/cli/") or path == "dite/evaluation.py" for path in users), users
    assert [path for path, tree in inside.items() if "dite_evals" in map(package, when_loaded(tree))] == []


def test_the_command_line_loads_nothing_heavy(trees):
    heavy = [
        f"{path} imports {module}"
        for path, tree in trees.items()
        if path.startswith("dite/cli/")
        for module in when_loaded(tree)
        if package(module) in HEAVY
    ]
    assert heavy == []


def test_triton_is_imported_only_in_the_kernels(trees):
    assert [path for path, tree in trees.items() if not path.startswith("kernels/") and "triton" in map(package, imported(tree))] == []
