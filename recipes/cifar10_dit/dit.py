"""The diffusion model: a class-conditional `DiTTransformer2DModel` on 4×8×8 latents, 15.8 M parameters, 16 tokens.

    x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε          1000 steps, linear β
    v   = √ᾱ_t ε − √(1 − ᾱ_t) x_0          what the model predicts (Salimans and Ho 2022, arXiv 2202.00512)
    loss = ‖v̂ − v‖²                        all timesteps alike

Min-SNR weighting, tried first, gave blurred pictures: latents of 8×8 have little redundancy, so that a picture is decided at noise levels that it
all but ignores (half of the 1000 steps have SNR < 0.085). That was judged by eye, not by FID.

Traps of the diffusers model: every block owns a label embedder that drops labels by itself, independently of the others, so its
`dropout_prob` is set to 0 after construction (which must see 0.1, else there is no row for the null label) and labels are dropped here,
once per sample; DiTPipeline's null label is 1000 whatever the number of classes, hence `num_embeds_ada_norm=1000`.
"""

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor

NULL_LABEL = 1000
LABEL_DROPOUT = 0.1


def build(patch_size: int = 2, num_layers: int = 10, num_heads: int = 4) -> DiTTransformer2DModel:
    """A fresh model with zero-initialised modulations and output, so that every block starts as the identity."""
    model = DiTTransformer2DModel(
        num_attention_heads=num_heads,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,  # DiTPipeline can't do without it
        num_layers=num_layers,
        sample_size=8,
        patch_size=patch_size,
        num_embeds_ada_norm=NULL_LABEL,
    )
    for block in model.transformer_blocks:
        embedder = block.norm1.emb.class_embedder
        embedder.dropout_prob = 0.0
        torch.nn.init.normal_(embedder.embedding_table.weight, std=0.02)
        _zero_(block.norm1.linear)
    for linear in (model.proj_out_1, model.proj_out_2):
        _zero_(linear)
    return model


def scheduler() -> DDIMScheduler:
    """The sampler that ships with the model."""
    return DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def make_loss(model: DiTTransformer2DModel, latents: torch.Tensor, labels: torch.Tensor, device: torch.device, compiled: bool):
    """Denoising loss over `latents` [2·N, 4, 8, 8] (the images, then their mirror images) and `labels` int64 [N]."""
    alphas = scheduler().alphas_cumprod
    # Softmax attention written as two matrix products: the fused CPU kernel's backward is five times slower at 16 tokens.
    for block in model.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    forward = torch.compile(model, dynamic=False) if compiled else model

    def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        size = len(indices)
        flip = torch.randint(2, (size,), generator=generator)
        x0 = latents[indices + flip * len(labels)].float()
        drop = torch.rand(size, generator=generator) < LABEL_DROPOUT
        y = torch.where(drop, NULL_LABEL, labels[indices])
        # Stratified over the batch: the same uniform marginal, a smaller variance of the gradient.
        t = ((torch.arange(size) + torch.rand(size, generator=generator)) / size * len(alphas)).long()
        noise = torch.randn(x0.shape, generator=generator)
        a = alphas[t][:, None, None, None]
        x_t, v = a.sqrt() * x0 + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x0
        predicted = forward(x_t.to(device), t.to(device), y.to(device), return_dict=False)[0]
        return (predicted.float() - v.to(device)).square().mean()

    return loss


def _zero_(linear: torch.nn.Linear) -> None:
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
