"""dite.sampling: a sample depends on its own seed, condition and row, and on nothing else."""

import pytest
import torch

from dite.errors import UnsupportedModel, UsageError
from dite.sampling import NonFiniteOutput, SampleSettings, class_ids, class_names, resolve_conditions, sample, sample_seed

QUICK = SampleSettings(num_steps=3, guidance=2.0, micro_batch=4)


@pytest.fixture
def pipe(tiny_pipeline):
    return tiny_pipeline


def draw(pipe, count, settings=QUICK, **options):
    return list(sample(pipe, [i % 10 for i in range(count)], range(count), settings, **options))


def test_a_sample_does_not_depend_on_how_many_are_drawn(pipe):
    few, many = draw(pipe, 3), draw(pipe, 11)
    assert len(many) == 11
    for a, b in zip(few, many, strict=False):
        assert torch.equal(a.image, b.image) and torch.equal(a.latent, b.latent)


def test_a_sample_does_not_depend_on_its_neighbours(pipe):
    first = list(sample(pipe, [1, 2, 3], [7, 8, 9], QUICK))
    second = list(sample(pipe, [4, 2, 0], [1, 8, 2], QUICK))
    assert torch.equal(first[1].image, second[1].image)
    assert not torch.equal(first[0].latent, second[0].latent)


def test_seed_and_condition_each_change_the_sample(pipe):
    a, b, c = (next(iter(sample(pipe, [cls], [seed], QUICK))).latent for cls, seed in ((1, 1), (1, 2), (2, 1)))
    assert not torch.equal(a, b) and not torch.equal(a, c)


def test_no_conditions_give_no_samples(pipe):
    assert draw(pipe, 0) == []


def test_the_image_is_what_the_pipeline_itself_would_draw(pipe):
    ours = next(iter(sample(pipe, [3], [5], SampleSettings(num_steps=3, guidance=2.0, micro_batch=1))))
    theirs = pipe([3], guidance_scale=2.0, num_inference_steps=3, generator=[torch.Generator().manual_seed(5)], output_type="np").images
    assert torch.equal(ours.image, torch.from_numpy((theirs * 255).round().astype("uint8"))[0].permute(2, 0, 1))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_trajectory_has_one_latent_a_step_and_ends_in_the_final_one(pipe, guidance):
    settings = SampleSettings(num_steps=5, guidance=guidance, micro_batch=2)
    for one in draw(pipe, 3, settings, trajectory=True):
        assert len(one.trajectory) == 5
        assert torch.equal(one.trajectory[-1], one.latent)
        assert one.latent.shape == (4, 8, 8) and one.latent.dtype == torch.float32
        assert one.image.shape == (3, 32, 32) and one.image.dtype == torch.uint8


def test_bfloat16_starts_from_the_same_noise_as_float32(pipe):
    wide = draw(pipe, 2, SampleSettings(num_steps=1, guidance=1.0, micro_batch=2))
    narrow = draw(pipe.to(torch.bfloat16), 2, SampleSettings(num_steps=1, guidance=1.0, micro_batch=2))
    for a, b in zip(wide, narrow, strict=True):
        assert (a.latent - b.latent).norm() < 0.02 * a.latent.norm()


def test_the_pipelines_module_draws_its_own_noise_again_afterwards(pipe):
    from diffusers.pipelines.dit import pipeline_dit
    from diffusers.utils.torch_utils import randn_tensor

    first, second = (iter(sample(pipe, [0], [seed], SampleSettings(num_steps=1, micro_batch=1))) for seed in (1, 2))
    next(first), next(second)
    assert pipeline_dit.randn_tensor is randn_tensor


def test_scheduler_step_and_progress_bar_are_restored_after_an_error(pipe):
    def explode(*_args, **_kwargs):
        raise KeyboardInterrupt

    step, config = pipe.scheduler.step, pipe._progress_bar_config
    pipe.transformer.forward = explode
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, 1)
    assert "step" not in vars(pipe.scheduler) and pipe.scheduler.step == step
    assert pipe._progress_bar_config is config


def test_a_step_that_someone_else_wrapped_comes_back(pipe):
    mine = pipe.scheduler.step
    pipe.scheduler.step = mine
    draw(pipe, 1)
    assert vars(pipe.scheduler)["step"] is mine


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_gives_no_numbers_raises_and_draws_nothing(pipe, value):
    with torch.no_grad():
        pipe.transformer.proj_out_2.bias.fill_(value)
    with pytest.raises(NonFiniteOutput, match="after step 1"):
        draw(pipe, 1)


def test_a_decoder_that_gives_no_numbers_raises(pipe):
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteOutput, match="image"):
        draw(pipe, 1)


def test_a_sampler_that_draws_from_the_global_generator_is_refused(pipe):
    from diffusers import DDPMScheduler

    pipe.scheduler = DDPMScheduler()
    with pytest.raises(UnsupportedModel, match="DDPMScheduler"):
        draw(pipe, 2)


def test_progress_counts_every_step_of_every_micro_batch(pipe):
    seen = []
    draw(pipe, 5, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_would_draw_another_seeds_image_is_refused(pipe, seed):
    with pytest.raises(UsageError, match="4294967295"):
        sample(pipe, [0], [seed])


def test_unequal_conditions_and_seeds_are_refused_before_sampling(pipe):
    with pytest.raises(UsageError, match="2 conditions, 1 seeds"):
        sample(pipe, [1, 2], [1])


@pytest.mark.parametrize("settings", [{"num_steps": 0}, {"micro_batch": 0}, {"guidance": -1.0}, {"guidance": float("nan")}])
def test_settings_that_cannot_be_sampled_are_refused(settings):
    with pytest.raises(UsageError):
        SampleSettings(**settings)


def test_a_bare_model_is_refused(pipe):
    with pytest.raises(UnsupportedModel, match="whole diffusers pipeline"):
        sample(pipe.transformer, [1], [1])


@pytest.fixture
def text_pipe():
    """A pipeline that draws from prompts: its image is its noise, pulled towards the prompt's length."""
    from types import SimpleNamespace

    from diffusers import DDIMScheduler, DiffusionPipeline
    from diffusers.utils.torch_utils import randn_tensor

    class TextPipeline(DiffusionPipeline):
        def __init__(self, scheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)

        def __call__(self, prompt, guidance_scale=1.0, num_inference_steps=5, generator=None, output_type="pil"):
            latents = randn_tensor((len(prompt), 3, 6, 5), generator=generator)
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                pull = torch.tensor([len(text) for text in prompt])[:, None, None, None] / 10
                latents = self.scheduler.step(latents * guidance_scale / 4 - pull, t, latents, return_dict=False)[0]
            return SimpleNamespace(images=(latents / 2 + 0.5).clamp(0, 1))

    return TextPipeline(DDIMScheduler())


def test_a_text_pipeline_draws_one_image_a_prompt(text_pipe):
    few = list(sample(text_pipe, ["a ship", "a horse"], [1, 2], QUICK, trajectory=True))
    many = list(sample(text_pipe, ["a ship", "a horse", "x", "y", "z"], range(1, 6), QUICK))
    assert few[1].image.shape == (3, 6, 5) and len(few[1].trajectory) == 3 and few[1].condition == "a horse"
    assert torch.equal(few[1].image, many[1].image)


def test_a_class_id_is_no_prompt(text_pipe):
    with pytest.raises(UsageError, match="conditioned on text"):
        sample(text_pipe, [3], [1])


def test_names_ids_and_decimal_strings_resolve(pipe):
    assert resolve_conditions(pipe, ["ship", 3, "7", " Truck "]) == [8, 3, 7, 9]


def test_comma_separated_synonyms_resolve_to_one_class(pipe):
    pipe.labels = {"goldfish": 1, "Carassius auratus": 1, "tench": 0}
    assert resolve_conditions(pipe, ["carassius auratus", "goldfish"]) == [1, 1]
    assert class_ids(pipe) == [0, 1] and class_names(pipe)[0] == "tench"


def test_without_names_every_id_of_the_embedding_is_a_class(pipe):
    pipe.labels = {}
    assert class_ids(pipe) == list(range(1000))
    with pytest.raises(UsageError, match="0 to 999"):
        resolve_conditions(pipe, ["ship"])


@pytest.mark.parametrize(("value", "hint"), [("shp", "did you mean ship"), ("10", "0 to 9"), (-1, "airplane"), (True, "airplane"), ("²", "airplane")])
def test_an_unknown_class_is_refused_with_what_there_is(pipe, value, hint):
    with pytest.raises(UsageError, match=hint):
        resolve_conditions(pipe, [value])


def test_a_run_has_no_seed_twice_and_neighbouring_runs_share_none():
    seeds = {seed: {sample_seed(seed, index) for index in range(5000)} for seed in (0, 1, 2)}
    assert all(len(values) == 5000 for values in seeds.values())
    assert not seeds[0] & seeds[1] and not seeds[1] & seeds[2]
    assert max(map(max, seeds.values())) < 2**32
