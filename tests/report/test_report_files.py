"""From files to files: the command, the published schema, and JSON that is damaged, foreign or old."""

import json
import random
from pathlib import Path

import jsonschema
import pytest
from pypdf import PdfReader
from synthetic import report_of

from resnet_bk.cli.main import main
from resnet_bk.errors import UserError
from resnet_bk.report.write import write_comparison, write_pdf, write_report
from resnet_bk.schema import json_schema, read_report, to_json

PUBLISHED = Path(__file__).parents[2] / "docs" / "report.schema.json"


@pytest.fixture(scope="module")
def text():
    return json.dumps(to_json(report_of(seeds=1, contestants=2)))


@pytest.fixture
def path(text, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(text)
    return path


def test_the_command_writes_pdf_and_page_beside_the_json(path, capsys):
    assert main(["report", str(path)]) == 0
    pdf, html = path.with_suffix(".pdf"), path.with_suffix(".html")
    assert capsys.readouterr().out.split() == [str(html), str(pdf)]
    assert len(PdfReader(pdf).pages) > 2 and html.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_folder_of_a_benchmark_stands_for_its_report(path, capsys):
    words = ["report", "--html", "none", "--json"]
    assert main([*words, str(path.parent)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "report": str(path),
        "pdf": str(path.with_suffix(".pdf")),
        "html": None,
    }
    assert main([*words, str(path.parent), str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["first"] == found["second"] == str(path)


def test_paths_can_be_chosen_and_the_page_left_out(path, tmp_path, capsys):
    out = tmp_path / "deep" / "paper.pdf"
    assert main(["report", str(path), "--out", str(out), "--html", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(path), "pdf": str(out), "html": None}
    assert out.exists() and not list(tmp_path.rglob("*.html"))
    page = tmp_path / "other.html"
    assert main(["report", str(path), "--out", str(out), "--html", str(page)]) == 0
    assert page.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [("report.html", []), ("report.pdf", []), ("other", ["--out", "other"]), ("other", ["--html", "./other"])],
)
def test_a_report_is_not_written_over_by_what_is_made_of_it(text, tmp_path, monkeypatch, capsys, name, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.write_text(text)
    for reports in ([name], [name, name]):
        if words or len(reports) == 1:
            assert main(["report", *reports, *words]) == 2
            assert "is the report that is read" in capsys.readouterr().err
    assert path.read_text() == text and list(tmp_path.iterdir()) == [path]


def test_two_reports_are_compared(path, tmp_path, capsys):
    second = tmp_path / "after" / "report.json"
    second.parent.mkdir()
    second.write_text(json.dumps(to_json(report_of(seeds=1, contestants=2, noise=1, slower=1.2))))
    assert main(["report", str(path), str(second)]) == 0
    said = capsys.readouterr()
    assert "time, step, ms" in said.out and "note: Not both runs have several seeds" in said.err
    assert said.out.split()[-1] == str(second.with_name("comparison.pdf"))
    assert main(["report", str(path), str(second), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["comparison"]
    assert any(change["claimed"] and change["what"] == "step" for change in found["changes"])
    assert main(["report", str(path), str(path)]) == 0
    assert "No difference exceeds the noise." in capsys.readouterr().out


@pytest.mark.parametrize("count", [0, 3])
def test_another_number_of_reports_is_one_line(path, capsys, count):
    assert main(["report", *[str(path)] * count]) == 2
    assert capsys.readouterr().err == f"error: {count} reports were named; name one, or two to compare them\n"


def test_the_published_schema_is_the_one_in_use(capsys):
    assert json.loads(PUBLISHED.read_text(encoding="utf-8")) == json_schema(), "resnet-bk report --schema > " + str(
        PUBLISHED.name
    )
    assert main(["report", "--schema"]) == 0
    assert capsys.readouterr().out == PUBLISHED.read_text(encoding="utf-8")


@pytest.mark.parametrize("options", [{}, {"failing": True}, {"foreign": True, "seeds": 1}, {"sections": ()}])
def test_the_schema_takes_every_report_and_refuses_what_is_none(options):
    checker = jsonschema.Draft202012Validator(json_schema())
    document = to_json(report_of(**options))
    checker.validate(document)
    assert not checker.is_valid({**document, "contestants": []})
    assert not checker.is_valid({**document, "workload": {**document["workload"], "batch_size": 0}})


def damaged(text):
    document = json.loads(text)
    yield "cut short", text[: len(text) // 2]
    yield "empty", ""
    yield "not JSON", "{nonsense"
    yield "a list", "[]"
    yield "another kind", json.dumps({**document, "kind": "shopping list"})
    yield "an older version", json.dumps({**document, "version": 1})
    yield "without workload", json.dumps({key: value for key, value in document.items() if key != "workload"})
    yield "one contestant", json.dumps({**document, "contestants": document["contestants"][:1]})
    yield "a word for a number", text.replace('"batch_size": 20', '"batch_size": "twenty"', 1)
    yield "without its machine", json.dumps({**document, "environment": {}})
    yield "no phases", changed(document, [], "results", "timing", "phases")
    yield "a phase fewer", changed(document, document["results"]["timing"]["phases"][2:], "results", "timing", "phases")
    yield "a length of 0", changed(document, 0, "results", "scaling", "axes", 0, "points", 0, "value")
    yield "a negative time", changed(document, -1.0, "results", "timing", "phases", 0, "seconds", "median")
    yield "no points", changed(document, [], "results", "scaling", "axes", 0, "points")
    yield "no curve", changed(document, [], "results", "convergence", "arms", 0, "validation")
    yield "a stranger", changed(document, "gpt", "contestants", 1, "key")


def changed(document, value, *place):
    """The document as JSON with another value at a place."""
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return json.dumps(copy)


def test_damaged_json_is_one_clear_line_and_writes_nothing(text, tmp_path, capsys):
    path = tmp_path / "report.json"
    for name, content in damaged(text):
        path.write_text(content)
        assert main(["report", str(path)]) == 2, name
        complaint = capsys.readouterr().err
        assert complaint.startswith(f"error: {path} ") and complaint.count("\n") == 1, name
        assert "resnet-bk bench" in complaint, name
        assert [file.name for file in tmp_path.iterdir()] == ["report.json"], name


def test_an_older_version_is_named(text, path):
    path.write_text(json.dumps({**json.loads(text), "version": 1}))
    with pytest.raises(
        UserError, match=r"'resnet-bk benchmark' version 1, this program reads .* version 2; make it again"
    ):
        read_report(path)
    path.write_text(json.dumps({**json.loads(text), "version": 3}))
    with pytest.raises(UserError, match=r"version 3, this program reads .* version 2; update resnet-bk"):
        read_report(path)


def test_a_damaged_second_report_is_named(text, path, tmp_path):
    second = tmp_path / "second.json"
    second.write_text(text[:100])
    with pytest.raises(UserError, match=r"second\.json is not a whole report"):
        write_comparison(path, second, pdf_path=tmp_path / "c.pdf", html_path=None)


def places(value, path=()):
    """Where every list, object and leaf of a document is."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@pytest.mark.slow
def test_no_value_at_any_place_ends_in_a_traceback(text, path, tmp_path):
    document = json.loads(text)
    chance = random.Random(0)
    values = [0, -1, 1e300, 10**18, "", "text", [], {}, None, [[]], True]
    whole = tmp_path / "whole.json"
    whole.write_text(text)
    for number, place in enumerate(chance.sample(list(places(document)), 60)):
        value = chance.choice(values)
        path.write_text(changed(document, value, *place))
        try:
            if number % 4:
                write_report(path, pdf_path=tmp_path / "report.pdf", html_path=tmp_path / "report.html")
            else:
                write_comparison(whole, path, pdf_path=tmp_path / "report.pdf", html_path=tmp_path / "report.html")
        except UserError as error:
            assert "\n" not in str(error), (place, value)


def test_a_missing_report_and_strange_names_are_refused(path, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_report(tmp_path / "nothing.json")
    with pytest.raises(UserError, match=r"does not end in \.pdf"):
        write_pdf(path, tmp_path / "report.docx")
    with pytest.raises(UserError, match=r"does not end in \.html"):
        write_report(path, pdf_path=tmp_path / "report.pdf", html_path=tmp_path / "report.txt")


def test_what_describes_the_machine_is_shown_whatever_it_is(text, path, tmp_path):
    path.write_text(changed(json.loads(text), -1, "environment", "commit"))
    write_pdf(path, tmp_path / "report.pdf")
