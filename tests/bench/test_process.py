"""Who had the processor while a cell was measured."""

import os

import pytest

from resnet_bk.bench import process
from resnet_bk.bench.process import Waiting

TICK = os.sysconf("SC_CLK_TCK")


@pytest.fixture
def told(monkeypatch, tmp_path):
    """What the system says of all processors, in seconds: used by programs, and by the machine's host."""

    def tell(busy: float, stolen: float = 0.0) -> None:
        fields = [busy * TICK, 0, 0, 1e6, 0, 0, 0, stolen * TICK, 0, 0]
        (tmp_path / "stat").write_text(f"cpu  {' '.join(str(int(field)) for field in fields)}\ncpu0 1 2\n")

    monkeypatch.setattr(process, "_STAT", tmp_path / "stat")
    return tell


def seconds(monkeypatch, running: float, waiting: float) -> None:
    """As if this process had had a processor, and waited, for so long."""
    had = os.times()
    monkeypatch.setattr(os, "times", lambda: os.times_result((running, 0.0, 0.0, 0.0, had.elapsed)))
    monkeypatch.setattr(process, "_running_and_waiting", lambda: (running, waiting))


@pytest.mark.parametrize(
    ("busy", "stolen", "share"),
    [(110.0, 0.0, 0.0), (115.0, 0.0, 5 / 105), (130.0, 0.0, 0.1 / 1.1), (110.0, 3.0, 3 / 103), (104.0, 0.0, 0.0)],
)
def test_nobody_waits_longer_for_others_than_they_had_a_processor(told, monkeypatch, busy, stolen, share):
    """Of 100 seconds at work and 10 of waiting; what all had is of 10 seconds before."""
    told(10.0)
    seconds(monkeypatch, 0.0, 0.0)
    watch = Waiting()
    told(busy, stolen)
    seconds(monkeypatch, 100.0, 10.0)
    assert watch.share() == pytest.approx(share, abs=1e-3)


def test_a_system_that_does_not_tell_has_no_share(monkeypatch, tmp_path):
    monkeypatch.setattr(process, "_STAT", tmp_path / "missing")
    assert Waiting().share() is None
