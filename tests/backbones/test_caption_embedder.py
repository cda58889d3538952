"""The caption's way to cross-attention."""

import torch

from smalti.backbones.caption_embedder import CaptionEmbedder


def make():
    embedder = CaptionEmbedder(12, 16, 8, ffn_multiple=8)
    for name, parameter in embedder.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return embedder


def test_the_block_starts_as_the_identity_and_is_not_it_later():
    fresh, text = CaptionEmbedder(12, 16, 8, ffn_multiple=8), torch.randn(2, 5, 12)
    expected = fresh.proj_out(fresh.act(fresh.proj_in(text)))
    assert torch.equal(fresh(text).tokens, expected)
    trained = make()
    other = text.clone()
    other[:, 4] += 1
    assert (trained(other).tokens - trained(text).tokens)[:, 0].abs().max() > 1e-4  # tokens see each other


def test_padding_enters_neither_tokens_nor_mean():
    embedder, text = make(), torch.randn(2, 3, 12)
    padded = torch.cat([text, torch.randn(2, 2, 12)], 1)
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    found, short = embedder(padded, mask), embedder(text)
    torch.testing.assert_close(found.tokens[:, :3], short.tokens)
    torch.testing.assert_close(found.vector, short.vector)


def test_zeros_stay_zeros():
    assert not make()(torch.zeros(2, 3, 12)).tokens.any()
