"""What README and reports show is what the committed results come to."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import from_samples  # noqa: E402
import readme_figures  # noqa: E402
from resnet_bk.schema import read_report  # noqa: E402

REPORTS = sorted((ROOT / "benchmarks" / "results").glob("*/report.json"))


def test_the_readme_shows_the_committed_results(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["readme_figures.py", "--check"])
    assert readme_figures.main() == 0


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.parent.name)
def test_a_published_reports_figures_are_those_of_its_samples(path):
    report = read_report(path)
    assert from_samples.made_anew(report) == report


def test_there_are_reports():
    assert {path.parent.name for path in REPORTS} == {"cpu", "gpu"}


def test_a_ratio_that_was_changed_is_made_anew(tmp_path, monkeypatch):
    text = REPORTS[-1].read_text()
    copy = tmp_path / "report.json"
    value = read_report(REPORTS[-1]).results.timing.ratios[0].ratio.value
    assert text.count(repr(value)) == 1
    copy.write_text(text.replace(repr(value), repr(value / 2)))
    monkeypatch.setattr(sys, "argv", ["from_samples.py", str(copy), "--check"])
    assert from_samples.main() == 1
    monkeypatch.setattr(sys, "argv", ["from_samples.py", str(copy)])
    assert from_samples.main() == 0
    assert read_report(copy) == read_report(REPORTS[-1])
