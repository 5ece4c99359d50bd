"""Small models that every test folder shares. Weights are random; shapes are ragged on purpose."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Models this small gain nothing from threads, and on a busy machine threads wait for each other longer than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# On some processors MKL, with which torch multiplies in fp32, rounds by where in memory its operands lie, unless it is told not to.
os.environ.setdefault("MKL_CBWR", "AVX2")


def _randomize(model, seed: int = 0):
    """Fill every parameter with small noise: several families start with zero-initialised outputs, which would hide any error."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture
def tiny_pipeline():
    """A small DiTPipeline, see `_tiny_pipeline`."""
    return _tiny_pipeline()


@pytest.fixture(scope="session")
def make_tiny_pipeline():
    """For fixtures that live longer than a test."""
    return _tiny_pipeline


def _tiny_pipeline():
    """A DiTPipeline of 2 blocks, width 48 (3 heads of 16), 10 classes, 8×8 latents and a 32×32 autoencoder."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, sample_size=8, norm_num_groups=4
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
    )
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    pipe = DiTPipeline(
        transformer=_randomize(transformer),
        vae=_randomize(vae, 1),
        scheduler=DDIMScheduler(clip_sample=False),
        id2label=dict(enumerate(names)),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _build(name: str):
    """A small random model of a family: a few thousand parameters, ragged widths."""
    import diffusers

    joint = {"attention_head_dim": 16, "num_attention_heads": 3, "joint_attention_dim": 24}
    configs = {
        "DiTTransformer2DModel": {
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "in_channels": 4,
            "num_layers": 2,
            "sample_size": 8,
            "norm_num_groups": 4,
        },
        "PixArtTransformer2DModel": {
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "sample_size": 8,
            "cross_attention_dim": 48,
            "caption_channels": 20,
        },
        "SD3Transformer2DModel": {
            "sample_size": 8,
            "in_channels": 4,
            "num_layers": 2,
            **joint,
            "caption_projection_dim": 48,
            "pooled_projection_dim": 20,
            "out_channels": 4,
            "pos_embed_max_size": 16,
        },
        "FluxTransformer2DModel": {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            **joint,
            "pooled_projection_dim": 20,
            "axes_dims_rope": [4, 4, 8],
        },
        "WanTransformer3DModel": {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 24,
            "freq_dim": 16,
            "ffn_dim": 72,
            "num_layers": 2,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        },
        "QwenImageTransformer2DModel": {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, **joint, "axes_dims_rope": (4, 4, 8)},
    }
    return _randomize(getattr(diffusers, name)(**configs[name]))


FAMILIES = (
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "WanTransformer3DModel",
    "QwenImageTransformer2DModel",
)


@pytest.fixture(params=FAMILIES)
def family_model(request):
    """One small random model of each supported family."""
    return _build(request.param)


@pytest.fixture
def build_model():
    """A function from a family's class name to a small random model."""
    return _build
