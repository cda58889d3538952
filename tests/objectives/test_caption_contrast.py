import math

import pytest
import torch
from torch.nn.functional import normalize

from smalti.core.protocols import Batch, Cond, TrainState
from smalti.core.seeds import generators_for
from smalti.objectives.caption_contrast import CaptionContrast, CaptionContrastModel, contrast, take_tokens
from smalti.tokenizers.vision_encoder import VisionTransformer


def model() -> CaptionContrastModel:
    encoder = VisionTransformer.untrained(depth=1, heads=2, head_dim=8, base_size=4)
    torch.manual_seed(0)
    return CaptionContrastModel(encoder, 16, 6)


def batch(count=6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(count, 6, generator=generator)
    pixels = torch.randn(count, 3, 32, 32, generator=generator)
    return Batch(pixels, Cond(pooled=text, label=torch.arange(count)), torch.arange(count))


def test_the_loss_is_the_symmetric_formula_written_out():
    torch.manual_seed(0)
    vectors, text, scale = torch.randn(4, 3), torch.randn(4, 3), torch.tensor(5.0)
    concepts = torch.tensor([7, 2, 7, 9])
    loss, right = contrast(vectors, text, concepts, scale)
    cosines = (5 * normalize(vectors, dim=1) @ normalize(text, dim=1).T).tolist()
    total = 0.0
    for side in (cosines, list(zip(*cosines, strict=True))):
        for row in range(4):
            partners = [column for column in range(4) if concepts[column] == concepts[row]]
            norm = math.log(sum(math.exp(value) for value in side[row]))
            total += sum(norm - side[row][column] for column in partners) / len(partners) / 8
    assert loss.item() == pytest.approx(total, rel=1e-5)
    hits = [concepts[max(range(4), key=cosines[row].__getitem__)] == concepts[row] for row in range(4)]
    assert right.item() == pytest.approx(sum(map(bool, hits)) / 4)


def test_pictures_of_one_concept_are_no_negatives_of_each_other():
    """Two pictures that are alike lose nothing by it when they show one thing, and must part when they do not."""
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    text, scale = torch.tensor([[1.0, 0.1], [0.1, 1.0]]), torch.tensor(10.0)
    same, _ = contrast(vectors, text, torch.tensor([3, 3]), scale)
    other, _ = contrast(vectors, text, torch.tensor([3, 4]), scale)
    (pull,) = torch.autograd.grad(same, vectors, retain_graph=True)
    (push,) = torch.autograd.grad(other, vectors)
    assert torch.equal(pull[0], pull[1])
    assert (push[0] - push[1]).abs().max() > 1


def test_patches_are_left_out_in_training_until_the_last_steps():
    trained, seen = model(), []
    encode = trained.encoder.encode
    trained.encoder.encode = lambda tokens: seen.append(tokens.shape[1]) or encode(tokens)  # type: ignore[method-assign]
    objective = CaptionContrast(patches=16, keep=0.5, whole_from=10)
    for step, training in ((0, True), (9, True), (10, True), (0, False)):
        trained.train(training)
        objective.loss(trained, batch(), TrainState(step), generators_for(range(6)))
    assert seen == [8, 8, 16, 16]


def test_each_patch_lies_in_the_space_of_sentences():
    trained, pixels = model().eval(), batch().x0
    by_patch = trained.projection(trained.encoder(pixels))
    assert torch.allclose(by_patch.mean(1), trained(pixels).vectors, atol=1e-5)


def test_the_temperature_is_learned_and_bounded():
    trained = model().train()
    assert trained(batch().x0).scale.item() == pytest.approx(1 / 0.07)
    objective = CaptionContrast(patches=16)
    objective.loss(trained, batch(), TrainState(), generators_for(range(6))).loss.backward()
    assert trained.log_scale.grad.abs() > 0
    trained.log_scale.data.fill_(9.0)
    assert trained(batch().x0).scale.item() == 100.0


def test_it_learns():
    trained, objective = model().train(), CaptionContrast(patches=16, keep=0.75, whole_from=50)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        result = objective.loss(trained, batch(), TrainState(step), generators_for(range(step * 6, step * 6 + 6)))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append(result.loss.item())
    assert losses[-1] < 0.3 < losses[0]


def test_tokens_are_taken_by_index():
    tokens = torch.arange(24.0).view(2, 4, 3)
    assert torch.equal(take_tokens(tokens, torch.tensor([[2, 0], [3, 3]]))[1], tokens[1, [3, 3]])
