"""`dite inspect`: what was found in a model, what each verb can do with it, and why not."""

import dite
from dite.cli import options
from dite.cli.output import Answer


def inspect(model: options.Model, json: options.Json = False, no_progress: options.NoProgress = False, verbose: options.Verbose = False) -> Answer:
    """Show a model's blocks and linears, its size under each recipe, and what is supported."""
    from dite.models.load import load_pipeline

    inspection = dite.inspect(load_pipeline(model))
    return Answer(inspection.to_dict(), inspection if hasattr(inspection, "__rich__") else str(inspection))
