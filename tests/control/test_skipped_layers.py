import pytest
import torch

import smalti
from smalti.control.headhunter_softpag import PerturbedHeads
from smalti.control.skipped_layers import SkippedLayers
from smalti.core.errors import Refusal, UserError
from smalti.evaluation.flops import count_flops


def without(model, layer, predict, strength=1.0):
    """The prediction of the model in which a block passes on what it got, without any method."""
    blocks = [*model.double_blocks, *model.single_blocks]

    def skip(module, arguments, named, outputs):
        given = [one for one in (*arguments, *named.values()) if isinstance(one, torch.Tensor)]
        several = isinstance(outputs, tuple)
        done = [
            (1 - strength) * out + strength * next(one for one in given if one.shape == out.shape)
            for out in (outputs if several else (outputs,))
        ]
        return tuple(done) if several else done[0]

    hook = blocks[layer].register_forward_hook(skip, with_kwargs=True)
    try:
        return predict()
    finally:
        hook.remove()


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_the_prediction_is_led_away_from_that_without_the_block(model, predict, strength):
    plain, skipped = predict(), without(model, 1, predict, strength)
    guided = predict(SkippedLayers({1: strength}, scale=2.0, guidance=1.0))
    assert torch.allclose(guided, 3 * plain - 2 * skipped, atol=1e-4)
    assert (guided - plain).abs().max() > 1e-3


def test_a_block_that_is_left_out_is_not_computed(model, predict):
    plain = count_flops(predict).total
    with smalti.apply(model, SkippedLayers({0: 1.0}, guidance=1.0)):
        predict()  # layouts are read in the first call
        assert plain < count_flops(predict).total < 2 * plain


def test_it_guides_the_conditional_half_as_heads_do(predict):
    plain, alone = predict(), predict(SkippedLayers({0: 1.0}, scale=2.0, guidance=1.0))
    guided = predict(SkippedLayers({0: 1.0}, scale=2.0, guidance=4.0))
    assert torch.equal(guided[0], plain[0])
    assert torch.allclose(guided[1], plain[1] + (alone[1] - plain[1]) / 4, atol=1e-4)


def test_two_damaged_passes_are_refused(model):
    with pytest.raises(Refusal, match="guidance by a damaged pass"):
        smalti.apply(model, SkippedLayers({0: 1.0}, guidance=1.0), PerturbedHeads({(0, 0): 1.0}, guidance=1.0))


@pytest.mark.parametrize(("layers", "reason"), [(None, "no layers"), ({9: 1.0}, "L9 was named")])
def test_layers_that_are_not_there_are_refused(predict, layers, reason):
    with pytest.raises(Refusal, match=reason):
        predict(SkippedLayers(layers, guidance=1.0))


@pytest.mark.parametrize("layers", [{-1: 1.0}, {0: 1.5}])
def test_bad_strengths_are_refused_in_one_line(layers):
    with pytest.raises(UserError, match="strengths lie in"):
        SkippedLayers(layers)
