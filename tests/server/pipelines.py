"""Small pipelines of several families whose prompts are read by a stub: embeddings drawn from the prompt's own seed."""

import zlib

import torch

from dite.server.job import ImageRequest
from tests.parallel.samples import fixtures


def embedding(prompts, *shape):
    """One row a prompt, the same for the same prompt."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32((text or "").encode()))) for text in prompts])


def _vae():
    vae = fixtures._tiny_pipeline().vae
    vae.register_to_config(shift_factor=0.1)
    return vae


def _negatives(prompts, negative):
    return negative if isinstance(negative, list) else [negative or ""] * len(prompts)


def pixart():
    import diffusers

    class Stubbed(diffusers.PixArtAlphaPipeline):
        def encode_prompt(self, prompt, guided=True, negative_prompt="", **_):
            mask = torch.ones(len(prompt), 7)
            return embedding(prompt, 7, 20), mask, embedding(_negatives(prompt, negative_prompt), 7, 20), mask

    model = fixtures._build("PixArtTransformer2DModel")
    model.register_to_config(sample_size=32)  # the pipeline knows the aspect ratios of trained sizes only
    return Stubbed(tokenizer=None, text_encoder=None, vae=_vae(), transformer=model, scheduler=diffusers.DPMSolverMultistepScheduler())


def sd3():
    import diffusers

    class Stubbed(diffusers.StableDiffusion3Pipeline):
        def encode_prompt(self, prompt, negative_prompt=None, **_):
            negative = _negatives(prompt, negative_prompt)
            return embedding(prompt, 5, 24), embedding(negative, 5, 24), embedding(prompt, 20), embedding(negative, 20)

    model = fixtures._build("SD3Transformer2DModel")
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = Stubbed(transformer=model, vae=_vae(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(names))
    pipe.default_sample_size = 8
    return pipe


def flux():
    import diffusers

    class Stubbed(diffusers.FluxPipeline):
        def encode_prompt(self, prompt, **_):
            return embedding(prompt, 5, 24), embedding(prompt, 20), torch.zeros(5, 3)

    model = _flux_model()
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe = Stubbed(transformer=model, vae=_vae(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(names))
    pipe.default_sample_size = 8
    return pipe


def _flux_model():
    import diffusers

    config = dict(fixtures._build("FluxTransformer2DModel").config) | {"in_channels": 16, "guidance_embeds": True}
    known = {name: value for name, value in config.items() if not name.startswith("_") and name != "out_channels"}
    return fixtures._randomize(diffusers.FluxTransformer2DModel(**known))


def dit():
    return fixtures._tiny_pipeline()


PIPELINES = {"dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux}


def request(condition=1, **changes):
    """A small request."""
    given = {"n": 1, "seed": 0, "steps": 4, "guidance": 2.0, "width_px": 32, "height_px": 32} | changes
    return ImageRequest(condition=condition, **given)
