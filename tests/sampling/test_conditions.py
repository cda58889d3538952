import pytest
import torch

from smalti.core.errors import UserError
from smalti.sampling.conditions import check_size, expand_request, label_conditions, label_indices

NAMES = ["noto", "twemoji"]


def test_pairs_and_repeats():
    request = expand_request(["a", "b"], "noto", 2)
    assert request.prompts == ["a", "a", "b", "b"]
    assert request.labels == ["noto"] * 4
    assert expand_request("a", [0, 1], 1) == (["a", "a"], [0, 1])
    assert expand_request(None, None, 3) == ([None] * 3, [None] * 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], None, 1), "empty list of prompts"),
        ((["a"], [], 1), "empty list of styles"),
        ((["a", "b", "c"], [0, 1], 1), "3 prompts and 2 styles"),
        (("a", None, 0), "0 pictures"),
    ],
)
def test_refused_requests(arguments, message):
    with pytest.raises(UserError, match=message):
        expand_request(*arguments)


def test_labels_by_name_index_or_none():
    assert label_indices(["twemoji", 0, None], NAMES, 2).tolist() == [1, 0, 2]
    assert label_indices([None], [], 0) is None
    for label, message in (("notto", "did you mean 'noto'"), (2, "from 0 to 1"), (True, "from 0 to 1")):
        with pytest.raises(UserError, match=message):
            label_indices([label], NAMES, 2)
    with pytest.raises(UserError, match="takes no style"):
        label_indices(["noto"], [], 0)


def test_models_of_labels_take_them_in_either_place():
    for request in (expand_request(["noto", 1], None, 1), expand_request("", ["noto", 1], 1)):
        conditions = label_conditions(request, NAMES, 2)
        assert conditions.cond.label.tolist() == [0, 1]
        assert conditions.uncond.label.tolist() == [2, 2]
        assert conditions.cond.text is None
    with pytest.raises(UserError, match="takes no text, give one"):
        label_conditions(expand_request("a cat", "noto", 1), NAMES, 2)
    assert label_conditions(expand_request(None, None, 1), [], 0).uncond is None


def test_sizes():
    check_size({"height": 64, "width": 96}, 16)
    for value, near in ((50, "48 or 64"), (8, "16 or 32"), (2.5, "16 or 32"), (-16, "16 or 32")):
        with pytest.raises(UserError, match=f"width.*multiple of 16, such as {near}"):
            check_size({"height": 64, "width": value}, 16)
    assert torch.is_tensor(label_indices([0], NAMES, 2))
