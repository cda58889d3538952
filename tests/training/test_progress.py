from smalti.training.progress import read_log, truncate_log


def test_lines_after_the_step_and_torn_ones_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    assert [line["step"] for line in read_log(path)] == [1, 2, 3]
    truncate_log(path, 2)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n'
    truncate_log(path, 0)
    assert path.read_text() == ""


def test_a_missing_log_is_begun(tmp_path):
    truncate_log(tmp_path / "log.jsonl", 5)
    assert read_log(tmp_path / "log.jsonl") == []
