"""`dite.Pipeline`: any diffusers pipeline, with dite's verbs as methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Pipeline:
    """Holds a diffusers pipeline in `.pipe`, is called like it, and delegates every other attribute to it.

    pipe = dite.Pipeline.from_pretrained("facebook/DiT-XL-2-256", quantize="w4a8")
    images = pipe(class_labels=[207]).images
    pipe.save("dit-w4a8")
    """

    def __init__(self, pipe: Any):
        object.__setattr__(self, "pipe", pipe)
        object.__setattr__(self, "_shared", None)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        quantize: Any = None,
        parallel: dict[str, Any] | None = None,
        backend: str = "auto",
        dtype: str | None = None,
        device: str = "cpu",
    ) -> Pipeline:
        """Load a folder, a hub id or `builtin:NAME`; `quantize` is a recipe (name, path, dict), `backend` names what runs quantized linears,
        `parallel` holds arguments of `dite.parallelize`, for a script whose ranks torchrun started: it stays shared out until `.unshare()`."""
        from dite.models.load import load_pipeline

        wrapper = cls(load_pipeline(source, dtype=dtype, device=device))
        if quantize is not None:
            wrapper.quantize(quantize)
        wrapper.set_backend(backend)
        if parallel is not None:
            wrapper.parallelize(**parallel)
        return wrapper

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.pipe(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("pipe", "_shared"):  # before __init__ has run, as in copying
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # `pipe.scheduler = ...` is diffusers' own idiom: it must reach the pipeline that samples.
        setattr(self.pipe, name, value)

    def to(self, *args: Any, **kwargs: Any) -> Pipeline:
        """Move or cast the pipeline; returns this wrapper."""
        self.pipe.to(*args, **kwargs)
        return self

    def __repr__(self) -> str:
        return f"dite.Pipeline({type(self.pipe).__name__})"

    def quantize(self, recipe: Any = "w4a8", **options: Any) -> Any:
        """`dite.quantize` on this pipeline; returns its report."""
        from dite.ptq.quantize import quantize

        return quantize(self.pipe, recipe, **options)

    def parallelize(self, *arguments: Any, **options: Any) -> Any:
        """`dite.parallelize` on this pipeline; returns the handle, which undoes it when closed. `stats()` then tells what was exchanged."""
        from dite.parallel.handle import parallelize

        self.unshare()
        object.__setattr__(self, "_shared", parallelize(self.pipe, *arguments, **options))
        return self._shared

    def unshare(self) -> None:
        """Undo `parallelize`, if it was done."""
        if self._shared is not None:
            self._shared.close()
            object.__setattr__(self, "_shared", None)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """`dite.save` of this pipeline."""
        from dite.checkpoint.save import save

        return save(self.pipe, folder, overwrite=overwrite)

    def inspect(self) -> Any:
        """`dite.inspect` of this pipeline."""
        from dite.models.inspect import inspect

        return inspect(self.pipe)

    def set_backend(self, name: str) -> Pipeline:
        """Choose what runs the quantized linears (`auto`, or a name from `dite doctor`)."""
        from dite.models.access import denoisers, text_encoders
        from dite.quant.linear import set_backend

        for model in (*denoisers(self.pipe).values(), *text_encoders(self.pipe).values()):
            set_backend(model, name)
        return self

    def stats(self) -> dict[str, Any]:
        """Bytes of the transformer, quantized layers by bits, and the backend of each kind of layer; `exchange` while it is shared out."""
        from dite.models.inspect import stats

        return stats(self.pipe) | ({"exchange": self._shared.stats()} if self._shared is not None else {})
