"""`smalti bench guided_start`: the folder it makes, and what its table asks."""

from smalti.core.discovery import load_benchmark
from smalti.data.folder import load_folder

guided_start = load_benchmark("guided_start")


def test_the_folder_is_one_of_pictures_with_captions(tmp_path):
    guided_start.write_pictures(tmp_path / "data", guided_start.Settings(pictures=6))
    pictures = load_folder(tmp_path / "data")
    assert len(pictures) == 6
    assert len(set(pictures.captions)) == 6


def test_the_table_stands_beside_what_is_asked():
    result = {
        "share of the budget": 0.95, "loss": 0.5, "forecast": 0.4, "held-out loss": {"quarter": 0.8, "end": 0.7},
        guided_start.METRIC: {"quarter": 900.0, "end": 800.0},
    }  # fmt: skip
    text = guided_start.table(result)
    for part in (
        "0.950  asked: 0.9 to 1.1",
        "1.250  asked: 0.8 to 1.2",
        "0.7000  asked: < 0.8000",
        "800.0  asked: < 900.0",
    ):
        assert part in text
