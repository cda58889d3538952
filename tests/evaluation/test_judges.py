import pytest
import torch

from smalti.core.errors import UserError
from smalti.evaluation.judges import JudgeTraining, RetrievalJudge, distractors, judge_report, train_judge

SETTINGS = JudgeTraining(steps=150, batch=64, seed=3)
TINY = {"width": 16, "hidden": 32, "dropout": 0.1}


def world(concepts, styles=3, seed=0):
    """Features and texts that are two linear views of one hidden concept vector."""
    generator = torch.Generator().manual_seed(7)
    to_feature, to_text = torch.randn(8, 40, generator=generator), torch.randn(8, 24, generator=generator)
    generator.manual_seed(seed)
    hidden = torch.randn(concepts, 8, generator=generator).repeat_interleave(styles, 0)
    features = hidden @ to_feature + 0.3 * torch.randn(concepts * styles, 40, generator=generator) + 5
    return features, hidden @ to_text, torch.arange(concepts).repeat_interleave(styles)


@pytest.fixture(scope="module")
def judge():
    return train_judge(*world(100), SETTINGS, **TINY)


def report(judge, features, text, concepts):
    captions = [f"thing {c}" for c in concepts.tolist()]
    return judge_report(judge, features, text, captions, torch.arange(len(captions)) % 3)


def test_judge_generalises_to_held_out_concepts(judge):
    features, text, concepts = world(40, seed=1)
    result = report(judge, features, text, concepts)
    assert result.first > 0.6
    assert result.preferred > 0.9
    assert (result.candidates, result.count) == (20, 120)


def test_shuffled_pictures_score_at_chance(judge):
    features, text, concepts = world(40, seed=1)
    order = torch.randperm(len(features))
    result = report(judge, features[order], text, concepts)
    assert result.first < 0.2
    assert 0.3 < result.preferred < 0.7


def test_same_seed_same_judge(judge):
    again = train_judge(*world(100), SETTINGS, **TINY)
    assert all(torch.equal(a, b) for a, b in zip(judge.state_dict().values(), again.state_dict().values()))


def test_several_captions_of_a_picture():
    features, text, concepts = world(100)
    unrelated = torch.randn_like(text)
    mixed = train_judge(features, torch.stack([text, text + 0.1 * unrelated], 1), concepts, SETTINGS, **TINY)
    held_out = world(40, seed=1)
    assert report(mixed, *held_out).first > 0.6
    wrong = train_judge(features, torch.stack([unrelated, -unrelated], 1), concepts, SETTINGS, **TINY)
    assert report(wrong, *held_out).first < 0.3


def test_saved_judge_gives_the_same_scores(judge, tmp_path):
    judge.save_pretrained(tmp_path)
    features, text, _ = world(5)
    assert torch.equal(RetrievalJudge.from_pretrained(tmp_path).eval()(features, text), judge(features, text))
    assert [file.suffix for file in tmp_path.glob("*.safetensors")]


def test_ties_count_against(judge):
    features, text, _ = world(2, styles=1)
    same = text[:, None].expand(-1, 4, -1)
    assert judge.rank(features, same).tolist() == [3, 3]
    assert not judge.prefers(features, text, text).any()


def test_distractors_are_distinct_and_within_the_group():
    captions = [f"c{i % 10}" for i in range(40)]
    groups = [i % 2 for i in range(40)]
    table = distractors(captions, 4, seed=1, groups=groups)
    for own, row in enumerate(table.tolist()):
        assert len({captions[i] for i in row} | {captions[own]}) == 5
        assert {groups[i] for i in row} == {groups[own]}
    assert torch.equal(table, distractors(captions, 4, seed=1, groups=groups))
    with pytest.raises(UserError, match="too few different captions"):
        distractors(captions, 5, seed=1, groups=groups)


def test_refuses():
    features, text, concepts = world(4)
    with pytest.raises(UserError, match="one text and concept for each picture"):
        train_judge(features, text[:-1], concepts)
    with pytest.raises(UserError, match="at least 2 concepts"):
        train_judge(features, text, torch.zeros_like(concepts))
