"""dite: the diffusion transformer efficiency engine.

Seven verbs and a wrapper, imported when first used, so that `import dite` is cheap:

    quantize   save   load   parallelize   inspect   evaluate   serve   Pipeline
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "quantize": "dite.ptq.quantize",
    "inspect": "dite.models.inspect",
    "save": "dite.checkpoint.save",
    "load": "dite.checkpoint.load",
    "evaluate": "dite.evaluation",
    "parallelize": "dite.parallel.handle",
    "serve": "dite.server.listen",
    "Pipeline": "dite.pipeline",
    "DiteConfig": "dite.checkpoint.diffusers_quantizer",
    "DiteError": "dite.errors",
    "UnsupportedModel": "dite.errors",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'dite' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _register() -> None:
    from dite.checkpoint.register import register_quantizers

    register_quantizers()


_register()
