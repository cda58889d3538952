import numpy as np

from smalti.sampling.pictures import draw_pictures
from smalti.zoo.loader import load_model


def test_each_picture_is_the_one_drawn_alone(tiny_models):
    pipe = load_model(tiny_models["text"])
    pipe.set_progress_bar_config(disable=None)
    prompts, styles = ["a cat", "a dog", "a cat"], ["flat", "round", "round"]
    together = draw_pictures(pipe, prompts, styles, range(3), num_inference_steps=2)
    assert len(together) == 3
    for index in range(3):
        [alone] = draw_pictures(
            pipe, prompts[index : index + 1], styles[index : index + 1], [index], num_inference_steps=2
        )
        assert np.abs(np.asarray(alone, dtype=int) - np.asarray(together[index], dtype=int)).max() <= 1
    assert np.asarray(together[0]).tobytes() != np.asarray(together[2]).tobytes()
    assert pipe._progress_bar_config == {"disable": None}
