"""`dite.Pipeline` as a holder of what was done to its pipeline."""

import pytest
import torch

import dite
from dite.errors import UsageError


def draw(pipe):
    return pipe(class_labels=[1], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images


def test_a_wrapper_is_shared_out_and_tells_what_was_exchanged(tiny_pipeline):
    pipe = dite.Pipeline(tiny_pipeline)
    pipe.parallelize(2, simulate=True)
    draw(pipe)
    assert pipe.stats()["exchange"]["bytes_sent"] > 0 and pipe.stats()["exchange"]["calls"] == 2


def test_unsharing_leaves_the_pipeline_as_it_was(tiny_pipeline):
    pipe = dite.Pipeline(tiny_pipeline)
    before = draw(pipe)
    pipe.parallelize(2, codec="int1", simulate=True)
    shared = draw(pipe)
    pipe.unshare()
    assert not (shared == before).all() and (draw(pipe) == before).all() and "exchange" not in pipe.stats()


def test_sharing_anew_replaces_the_first(tiny_pipeline):
    pipe = dite.Pipeline(tiny_pipeline)
    pipe.parallelize(2, simulate=True)
    assert pipe.parallelize(4, simulate=True).stats()["ranks"] == 4


def test_one_model_is_shared_out_once(tiny_pipeline):
    with dite.parallelize(tiny_pipeline, 2, simulate=True), pytest.raises(UsageError, match="shared out already"):
        dite.parallelize(tiny_pipeline, 2, simulate=True)


def test_several_ranks_need_several_processes(tiny_pipeline):
    with pytest.raises(UsageError, match="torchrun --nproc-per-node 2"):
        dite.parallelize(tiny_pipeline, 2)


def test_one_rank_is_the_plain_pipeline(tiny_pipeline):
    before = draw(tiny_pipeline)
    with dite.parallelize(tiny_pipeline, 1) as par:
        assert (draw(tiny_pipeline) == before).all() and par.stats()["mode"] == "one device"
