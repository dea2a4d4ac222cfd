"""metrics.jsonl: one JSON object a line, whatever the numbers, the kill or the disk."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
from small_training import files_of_at_most, refused

from resnet_bk.training.metrics import MetricsLog, read_metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write(path, *entries, first_step=0):
    with MetricsLog(path, first_step=first_step) as log:
        for entry in entries:
            log.append(entry)


def test_entries_come_back_in_order(path):
    entries = [{"step": 1, "loss": 0.1 + 0.2, "expert_load": [[0.5, 0.5]]}, {"step": 2, "loss": 1e-300, "scale": None}]
    write(path, *entries)
    assert read_metrics(path) == entries
    assert path.read_text().count("\n") == 2


def test_an_entry_can_be_read_while_the_log_is_open(path):
    with MetricsLog(path, first_step=0) as log:
        log.append({"step": 1})
        assert read_metrics(path) == [{"step": 1}]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_become_null(path, number):
    write(path, {"step": 1, "grad_norm": number, "loss": 2.0})
    (line,) = path.read_text().splitlines()
    parsed = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert parsed == {"step": 1, "grad_norm": None, "loss": 2.0}


def test_what_came_after_the_checkpoint_is_dropped(path):
    write(path, *({"step": step, "loss": 1.0} for step in (1, 2, 2, 3, 4)))
    write(path, {"step": 3, "loss": 2.0}, first_step=2)
    assert [(entry["step"], entry["loss"]) for entry in read_metrics(path)] == [(1, 1.0), (2, 1.0), (2, 1.0), (3, 2.0)]


def test_a_last_line_cut_anywhere_is_left_out_and_written_over(path):
    write(path, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5})
    content = path.read_bytes()
    first_line = content.index(b"\n") + 1
    for end in range(first_line, len(content) - 1):
        path.write_bytes(content[:end])
        assert read_metrics(path) == [{"step": 1, "loss": 1.0}]
        write(path, {"step": 2, "loss": 0.25}, first_step=1)
        assert [entry["loss"] for entry in read_metrics(path)] == [1.0, 0.25]


@pytest.mark.parametrize(
    "line",
    [b"[1]", b"3", b"{}", b'{"step": "2"}', b'{"step": 2.0}', b'{"step": true}', b'{"step": 2, "x": NaN}', b"\xff"],
)
def test_reading_stops_at_a_damaged_line(path, line):
    good = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    path.write_bytes(b"\n".join([json.dumps(good[0]).encode(), line, json.dumps(good[1]).encode(), b""]))
    assert read_metrics(path) == good[:1]
    write(path, good[1], first_step=1)
    assert read_metrics(path) == good


def test_a_file_that_is_not_there_has_no_entries(path):
    assert read_metrics(path) == []


def test_a_full_disk_is_one_line_and_loses_no_earlier_entry(path):
    message = "cannot write .*metrics.jsonl: File too large; free some space and go on with --resume"
    with refused(message), files_of_at_most(100), MetricsLog(path, first_step=0) as log:
        log.append({"step": 1})
        log.append({"step": 2, "expert_load": [0.5] * 100})
    assert read_metrics(path) == [{"step": 1}]
    write(path, {"step": 2}, first_step=1)
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_numbers_go_to_tensorboard_where_it_is_installed(path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder, *, purge_step):
            calls.append(("open", folder, purge_step))

        def add_scalar(self, key, value, step):
            calls.append((key, value, step))

        def close(self):
            calls.append(("close",))

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    write(path, {"step": 7, "loss": 0.5, "tokens": 100, "expert_load": [[1.0]]}, first_step=6)
    assert calls == [("open", str(path.parent / "tensorboard"), 6), ("loss", 0.5, 7), ("close",)]
    assert len(read_metrics(path)) == 1
