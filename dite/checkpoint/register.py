"""Teach diffusers and transformers the name `dite`, without importing either: it costs seconds, and `import dite` must stay cheap."""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

DIFFUSERS, TRANSFORMERS = "diffusers.quantizers.auto", "transformers.quantizers.auto"
QUANTIZER = "dite.checkpoint.diffusers_quantizer"


def register_quantizers() -> None:
    """Fill each library's two quantizer tables now if it is imported already, else as soon as it is."""
    for target in (DIFFUSERS, TRANSFORMERS):
        if target in sys.modules:
            _fill(sys.modules[target])
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _fill(auto) -> None:
    # Mutated, never rebound: other modules hold references to these dictionaries.
    if auto.__name__ == TRANSFORMERS:  # imported by diffusers, half-way through, which our quantizers import in turn
        auto.AUTO_QUANTIZER_MAPPING["dite"] = _Late("dite.checkpoint.transformers_quantizer", "DiteTextQuantizer")
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING["dite"] = _Late(QUANTIZER, "DiteConfig")
        return
    quantizer = sys.modules.get(QUANTIZER)
    if quantizer is None:
        quantizer = import_module(QUANTIZER)
    elif not hasattr(quantizer, "DiteQuantizer"):
        return  # it is what imported diffusers, and is half-way through: it registers itself at its end
    auto.AUTO_QUANTIZER_MAPPING["dite"] = quantizer.DiteQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["dite"] = quantizer.DiteConfig


class _Late:
    """A class that is imported when it is used, as transformers uses those of its tables."""

    def __init__(self, module: str, name: str):
        self._home = module, name

    def __call__(self, *args, **kwargs):
        return getattr(import_module(self._home[0]), self._home[1])(*args, **kwargs)

    def from_dict(self, *args, **kwargs):
        return getattr(import_module(self._home[0]), self._home[1]).from_dict(*args, **kwargs)


class _AfterImport(MetaPathFinder):
    """Finds the two modules as usual, and fills their tables right after they have run."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in (DIFFUSERS, TRANSFORMERS):
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
