"""Attention computed block by block of keys equals attention over all of them."""

import pytest
import torch
import torch.nn.functional as F

from dite.errors import UnsupportedModel
from dite.parallel.attention import Attention, Catch, Partial, attention_with_lse, heads, tokens

MASKS = {"none": None, "bool": torch.tensor([True, False, True, True, False]).view(1, 1, 1, 5), "added": torch.randn(1, 1, 1, 5)}


def call(text=5, first=True, mask=None, scale=None, size=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, text + 13, size, generator=generator).to(dtype) for _ in range(3))
    return Attention(q, k, v, text, first, mask, scale)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_blocks_of_keys_merge_into_plain_attention(mask, first, scale):
    whole = call(first=first, mask=MASKS[mask], scale=scale)
    k, v = whole.image_of(whole.k), whole.image_of(whole.v)
    partial = Partial(whole)
    partial.add(whole.text_of(whole.k), whole.text_of(whole.v), whole.mask)
    for rows in (slice(0, 6), slice(6, 7), slice(7, 13)):
        partial.add(k[:, :, rows], v[:, :, rows])
    torch.testing.assert_close(partial.result(), whole.over(k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_attention_over_given_keys_is_torchs_own(first):
    whole = call(first=first)
    expected = F.scaled_dot_product_attention(whole.q, whole.k, whole.v)
    assert torch.equal(whole.over(whole.image_of(whole.k), whole.image_of(whole.v)), expected)


def test_a_masked_text_token_is_not_seen():
    whole = call(mask=MASKS["bool"])
    expected = F.scaled_dot_product_attention(whole.q, *(torch.cat([x[:, :, [0, 2, 3]], x[:, :, 5:]], dim=2) for x in (whole.k, whole.v)))
    torch.testing.assert_close(whole.over(whole.image_of(whole.k), whole.image_of(whole.v)), expected)


@pytest.mark.parametrize("size", [16, 12])
def test_the_log_sum_of_exponents_is_that_of_the_scores(size):
    one = call(text=0, size=size)
    _, lse = attention_with_lse(one.q, one.k, one.v, None, None)
    torch.testing.assert_close(lse, (one.q @ one.k.mT / size**0.5).logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_large_scores_merge_without_overflow():
    one = call(text=0, scale=200.0)
    partial = Partial(one)
    for rows in (slice(0, 7), slice(7, 13)):
        partial.add(one.k[:, :, rows], one.v[:, :, rows])
    torch.testing.assert_close(partial.result(), one.over(one.k, one.v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_text_and_image_are_told_apart_and_joined_again(first):
    one = call(first=first)
    assert one.text_of(one.k).shape[2] == 5 and torch.equal(one.join(one.text_of(one.k), one.image_of(one.k)), one.k)


def test_heads_and_tokens_are_each_others_inverse():
    x = torch.randn(2, 3, 5, 4)
    assert torch.equal(heads(tokens(x), 3), x)


def test_only_scaled_dot_product_attention_is_caught():
    q = torch.randn(1, 2, 3, 4)
    with Catch(lambda q, k, v, mask, scale: q + 1) as catch:
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), q + 1) and torch.equal(q * 2, q + q)
    assert catch.caught == 1 and F.scaled_dot_product_attention(q, q, q).shape == q.shape


@pytest.mark.parametrize("wrong", [{"is_causal": True}, {"dropout_p": 0.1}])
def test_what_cannot_be_shared_out_is_refused(wrong):
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(UnsupportedModel), Catch(lambda *_: q):
        F.scaled_dot_product_attention(q, q, q, **wrong)
