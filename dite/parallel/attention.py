"""Catching a model's attention, whatever its family, and computing it from parts.

Every diffusers attention ends in `torch.nn.functional.scaled_dot_product_attention`, with normalized and rotated q, k, v. While an attention module's
forward runs, a TorchFunctionMode (torch's public door for this) hands that one call to whoever shards it.

Shapes: q, k, v [B, H, T + l, D], of which T tokens of text, first or last, are the same on every rank and l are this rank's own tokens of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dite.errors import UnsupportedModel


@dataclass(frozen=True)
class Attention:
    """One call of scaled_dot_product_attention. `mask` over the T text keys only (the image's are all seen), [B or 1, 1, 1, T], bool or added."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    text: int = 0
    text_first: bool = True
    mask: torch.Tensor | None = None
    scale: float | None = None

    def image_of(self, x: torch.Tensor) -> torch.Tensor:
        """The image's tokens of q, k, v or the result."""
        return x[:, :, self.text :] if self.text_first else x[:, :, : x.shape[2] - self.text]

    def text_of(self, x: torch.Tensor) -> torch.Tensor:
        """The text's."""
        return x[:, :, : self.text] if self.text_first else x[:, :, x.shape[2] - self.text :]

    def join(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Both again."""
        if not self.text:
            return image
        return torch.cat([text, image] if self.text_first else [image, text], dim=2)

    def heads(self, first: int, last: int) -> Attention:
        """Some of the heads only."""
        mask = self.mask[:, first:last] if self.mask is not None and self.mask.shape[1] > 1 else self.mask
        return replace(self, q=self.q[:, first:last], k=self.k[:, first:last], v=self.v[:, first:last], mask=mask)

    def over(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The result with these as the image's keys and values."""
        keys, values = self.join(self.text_of(self.k), k), self.join(self.text_of(self.v), v)
        mask = None
        if self.mask is not None:
            seen = (*self.mask.shape[:-1], k.shape[2])
            image = self.mask.new_ones(seen) if self.mask.dtype == torch.bool else self.mask.new_zeros(seen)
            mask = torch.cat([self.mask, image] if self.text_first else [image, self.mask], dim=-1)
        return F.scaled_dot_product_attention(self.q, keys, values, attn_mask=mask, scale=self.scale)


def tokens(x_BHLD: torch.Tensor) -> torch.Tensor:
    """[B, H, l, D] → [B, l, H·D]; a view where the memory lies so, as diffusers' does."""
    return x_BHLD.transpose(1, 2).flatten(2)


def heads(x_BLC: torch.Tensor, count: int) -> torch.Tensor:
    """[B, l, H·D] → [B, H, l, D], a view."""
    return x_BLC.unflatten(2, (count, -1)).transpose(1, 2)


class Partial:
    """Attention over one block of keys after another: out = Σ softmax parts, weighted by their log-sum-exp (as in Ring and FlashAttention)."""

    def __init__(self, call: Attention):
        self.call = call
        self._out: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None

    def add(self, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Take these keys and values in."""
        out, lse = attention_with_lse(self.call.q, k, v, mask, self.call.scale)
        if self._out is None:
            self._out, self._lse = out.float(), lse
            return
        both = torch.logaddexp(self._lse, lse)
        self._out = self._out * (self._lse - both).exp()[..., None] + out.float() * (lse - both).exp()[..., None]
        self._lse = both

    def result(self) -> torch.Tensor:
        return self._out.to(self.call.q.dtype)


def attention_with_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None):
    """(softmax(q·kᵀ·scale + mask)·v, log Σ exp), the latter fp32 [B, H, Lq]. torch's own kernels where they give it, else in fp32."""
    added = None
    if mask is not None:
        added = mask.to(q.dtype)
        if mask.dtype == torch.bool:
            added = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -torch.inf)
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=added, scale=scale)
    scores = q.float() @ k.float().transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if added is not None:
        scores = scores + added
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.float()).to(q.dtype), lse


class Catch(TorchFunctionMode):
    """Hands scaled_dot_product_attention to `attend(q, k, v, mask, scale)` and everything else to torch. `caught` counts."""

    def __init__(self, attend: Callable[..., torch.Tensor]):
        super().__init__()
        self.attend = attend
        self.caught = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.caught += 1
        return self.attend(*_arguments(*args, **(kwargs or {})))


def _arguments(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float | None]:
    wrong = "it is causal" if is_causal else "it drops out" if dropout_p else None
    wrong = wrong or ("its keys have other heads than its queries" if enable_gqa and key.shape[1] != query.shape[1] else None)
    wrong = wrong or (f"its queries have {query.ndim} dimensions" if query.ndim != 4 else None)
    if wrong:
        raise UnsupportedModel(f"an attention can't be shared out: {wrong}", "use the model on one device")
    return query, key, value, attn_mask, scale
