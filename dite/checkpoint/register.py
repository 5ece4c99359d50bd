"""Teach diffusers the name `dite`, without importing diffusers: it costs seconds, and `import dite` must stay cheap."""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

TARGET = "diffusers.quantizers.auto"
QUANTIZER = "dite.checkpoint.diffusers_quantizer"


def register_with_diffusers() -> None:
    """Fill diffusers' two quantizer tables now if it is imported already, else as soon as it is."""
    if TARGET in sys.modules:
        _fill(sys.modules[TARGET])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _fill(auto) -> None:
    quantizer = sys.modules.get(QUANTIZER)
    if quantizer is None:
        quantizer = import_module(QUANTIZER)
    elif not hasattr(quantizer, "DiteQuantizer"):
        return  # it is what imported diffusers, and is half-way through: it registers itself at its end
    # Mutated, never rebound: other modules hold references to these dictionaries.
    auto.AUTO_QUANTIZER_MAPPING["dite"] = quantizer.DiteQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["dite"] = quantizer.DiteConfig


class _AfterImport(MetaPathFinder):
    """Finds `diffusers.quantizers.auto` as usual, and fills its tables right after it has run."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != TARGET:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_then_fill(module):
            run(module)
            _fill(module)

        spec.loader.exec_module = run_then_fill
        return spec
