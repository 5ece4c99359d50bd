"""Weights for Inception that anybody can make again: whole numbers from a hash, and the features another implementation has with them."""

import torch

MULTIPLIER = 2654435761
FAN = 6


def fill_(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fill every tensor in place with numbers that depend on the key's length and the position alone, of a size that keeps activations finite."""
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        numbers = torch.arange(value.numel(), dtype=torch.int64) + 1000 * len(key)
        wave = ((numbers * MULTIPLIER >> 16) % 4096 / 2048 - 1).double().reshape(value.shape)
        if key.endswith(("conv.weight", "fc.weight")):
            wave *= (FAN / value[0].numel()) ** 0.5
        elif key.endswith(("bn.weight", "running_var")):
            wave = 1 + wave / 4
        else:
            wave /= 4
        value.copy_(wave)
    return state


def images() -> torch.Tensor:
    """Two images of 60×40 pixels."""
    return (torch.arange(2 * 3 * 40 * 60) * 37 % 256).to(torch.uint8).reshape(2, 3, 40, 60)


# torch-fidelity 0.4.0, inception-v3-compat, with these weights: every fifth part of the second image's vector, then mean and deviation of both.
GOLDEN = {
    "features": ([47.861519, 0.066496, 0.535433, 5.029171, 0.811084, 0.0], 21.812989, 39.556477),
    "logits": ([-67.907021, 26.977715, 62.580746, -25.575371, -39.152233, -6.704463], -0.647596, 50.551294),
    "spatial": ([727.486145, 609.667419, 289.305573, 0.0, 0.0, 0.0], 173.991817, 288.629450),
}
