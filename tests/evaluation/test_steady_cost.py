import pytest

from smalti.acceleration.grat import GRAT
from smalti.evaluation.flops import count_flops
from smalti.evaluation.held_out_prompts import Prompts, draw_latents
from smalti.evaluation.steady_cost import steady_cost
from smalti.zoo.loader import load_model


def test_reading_the_layout_is_not_counted():
    pipe, prompts = load_model("emoji-1k"), Prompts(("red heart",), ("noto",), (0,))
    pipe.set_progress_bar_config(disable=True)
    plain = count_flops(lambda: draw_latents(pipe, prompts, 2, guidance_scale=1.0))
    neutral, sparse = (steady_cost(pipe, one, prompts, 2, 1, 1) for one in (GRAT.neutral(), GRAT((1, 2, 2), "cross")))
    assert neutral.flops.total == pytest.approx(plain.total)
    assert sparse.flops.products == pytest.approx(plain.products)
    assert sparse.flops.attention < 0.6 * plain.attention
    assert sparse.seconds > 0
