"""Whatever scheduler a pipeline came with, its saved configuration is read back."""

import inspect

import diffusers
import pytest

from dite.checkpoint.fields import check_fields
from dite.checkpoint.index import check_values


def _schedulers():
    """Those that can be made without arguments."""
    for name in sorted(dir(diffusers)):
        cls = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
        if isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin) and "Flax" not in name:
            arguments = list(inspect.signature(cls.__init__).parameters.values())[1:]
            if all(one.default is not one.empty or one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL) for one in arguments):
                yield name


@pytest.mark.parametrize("name", list(_schedulers()))
def test_the_configuration_of_each_scheduler_passes_the_checks(name, tmp_path):
    scheduler = getattr(diffusers, name)()
    scheduler.save_pretrained(tmp_path)
    values = check_values(tmp_path / "scheduler_config.json", "scheduler", "scheduler_config.json")
    check_fields(type(scheduler), values, "scheduler_config.json")
    assert values["_class_name"] == name
