"""The autoencoder: 32×32 RGB to 4×8×8 latents (f=4), 1.6 M parameters, plain convolutions.

Loss: L1 + L1 of the image gradients (keeps edges sharp without an adversary) + MSE + a small KL. After training, the latents' per-channel mean
and deviation over the data are folded into the 1×1 `quant_conv` and `post_quant_conv`, so that the diffusion model sees zero mean and unit
variance with `scaling_factor = 1`: diffusers' DiTPipeline knows no shift.
"""

import torch
import torch.nn.functional as F
from data import to_signed
from diffusers import AutoencoderKL

KL_WEIGHT = 3e-4


def build() -> AutoencoderKL:
    """A fresh autoencoder."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        sample_size=32,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def make_loss(vae: AutoencoderKL, images: torch.Tensor, device: torch.device):
    """Reconstruction loss over `images` uint8 [N, 3, 32, 32] with random flips."""

    def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        x = to_signed(images[indices])
        flip = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(-1), x).to(device)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        y = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        gradients = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        return F.l1_loss(y, x) + gradients + F.mse_loss(y, x) + KL_WEIGHT * kl

    return loss


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, device: torch.device, batch_size: int = 100) -> torch.Tensor:
    """Posterior means of `images` uint8 [N, 3, 32, 32] as fp32 [N, 4, 8, 8]."""
    return torch.cat([vae.encode(to_signed(batch).to(device)).latent_dist.mean.cpu() for batch in images.split(batch_size)])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor, device: torch.device, batch_size: int = 100) -> torch.Tensor:
    """Latents [N, 4, 8, 8] to uint8 images [N, 3, 32, 32]."""
    batches = [vae.decode(batch.to(device)).sample.cpu() for batch in latents.split(batch_size)]
    return ((torch.cat(batches) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


@torch.no_grad()
def standardize_(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Fold the per-channel mean and deviation of `latents` [N, 4, 8, 8] into the two 1×1 convolutions, in place; reconstructions don't change."""
    mean, std = latents.mean((0, 2, 3)).to(vae.device), latents.std((0, 2, 3)).to(vae.device)
    channels = len(mean)
    vae.quant_conv.weight[:channels] /= std[:, None, None, None]
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / std
    vae.quant_conv.bias[channels:] -= 2 * std.log()
    after = vae.post_quant_conv
    after.bias += torch.einsum("oc,c->o", after.weight[:, :, 0, 0], mean)
    after.weight *= std[None, :, None, None]
