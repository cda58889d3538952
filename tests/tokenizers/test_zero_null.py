"""No caption is zeros, in training and in sampling, and every other caption is what it was."""

import torch

from smalti.core.protocols import TextEmbedding
from smalti.core.seeds import generators_for
from smalti.sampling.conditions import expand_request, text_conditions
from smalti.tokenizers.zero_null import ZeroNull
from smalti.training.latent_source import LatentSource, embed_captions


class Words:
    """Each prompt by its length; the mask is that of a real encoder, whose empty prompt has two special tokens."""

    def encode(self, prompts):
        lengths = torch.tensor([float(len("".join(one))) for one in prompts])
        tokens = (1 + lengths)[:, None, None].expand(-1, 4, 6).clone()
        mask = torch.arange(4) < (2 + lengths.clamp(max=2))[:, None]
        return TextEmbedding(tokens, tokens[:, 0], mask, torch.where(mask, 0, -1))


def test_only_empty_prompts_are_zeros():
    found, plain = ZeroNull(Words()).encode(["", "cat", ["", ""], ["a", ""]]), Words().encode(["", "cat", [], ["a"]])
    for row, is_empty in enumerate([True, False, True, False]):
        assert found.tokens[row].any() != is_empty
        assert found.pooled[row].any() != is_empty
        if not is_empty:
            assert torch.equal(found.tokens[row], plain.tokens[row])
            assert torch.equal(found.mask[row], plain.mask[row])
    assert found.mask[0].all()


def test_both_ends_of_guidance_get_them():
    encoder = ZeroNull(Words())
    dropped = embed_captions([["cat"]], encoder).text[-1:]
    assert not dropped.tokens.any()
    conditions = text_conditions(expand_request(["cat"], None, 1), encoder, [], 0)
    assert not conditions.uncond.text.any()
    assert conditions.cond.text.any()


def test_captions_are_dropped_sample_by_sample():
    captions = embed_captions([["cat"]] * 40, ZeroNull(Words()))
    source = LatentSource([torch.zeros(40, 1, 2, 2)], captions, text_dropout=0.5)
    batch = source.batch(torch.arange(40), generators_for(list(range(40))))
    dropped = ~batch.cond.text.flatten(1).any(1)
    assert 10 <= dropped.sum() <= 30
    assert torch.equal(dropped, ~batch.cond.pooled.any(1))
