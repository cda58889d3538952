"""Published shapes: as many parameters and tokens as the real models, and loops that run."""

from dataclasses import replace

import pytest
import torch

from smalti.core.errors import UserError
from smalti.evaluation import full_size_video
from smalti.evaluation.full_size_video import SHAPES, blocks_of, full_size_run


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_published_weights(name):
    model = SHAPES[name].build("meta")
    assert sum(one.numel() for one in model.parameters()) == pytest.approx(SHAPES[name].parameters, rel=2e-3)
    assert len(blocks_of(model)) == SHAPES[name].config["num_layers"]


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("wan-14b", (81, 480, 832), 32_760),
        ("wan-1.3b", (81, 480, 832), 32_760),
        ("ltx-2b", (161, 512, 768), 8_064),
        ("cogvideox-2b", (49, 480, 720), 17_550),
        ("pixart-sigma", (1, 1024, 1024), 4_096),
    ],
)
def test_tokens(name, size, tokens):
    assert SHAPES[name].tokens(*size) == tokens


@pytest.mark.parametrize(
    ("name", "small", "size"),
    [
        ("wan-1.3b", {"num_layers": 1, "num_attention_heads": 1, "ffn_dim": 32, "attention_head_dim": 16}, (5, 32, 48)),
        ("ltx-2b", {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16},
         (9, 64, 96)),
        ("cogvideox-2b", {"num_layers": 1, "num_attention_heads": 1, "time_embed_dim": 16, "max_text_seq_length": 3},
         (5, 32, 48)),
        ("pixart-sigma", {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8,
                          "cross_attention_dim": 16}, (1, 64, 96)),
    ],
)  # fmt: skip
def test_loops_run_on_small_ones(name, small, size, monkeypatch):
    shape = replace(SHAPES[name], config={**SHAPES[name].config, **small}, text=(3, 4096))
    monkeypatch.setitem(full_size_video.SHAPES, name, shape)
    _, run = full_size_run(name, size, 2, torch.device("cpu"), torch.float32)
    out = run()
    assert out.shape == (1, *shape.latents(*size))
    assert out.isfinite().all()


def test_an_unknown_one_is_named():
    with pytest.raises(UserError, match="wan-14b"):
        full_size_run("wan-13b", (5, 32, 48), 2, torch.device("cpu"))
