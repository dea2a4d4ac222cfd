"""The page: complete, self-contained, readable point by point, and nothing in it is read as markup."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from shown import marks, plots, said
from synthetic import report_of

import resnet_bk.report
from resnet_bk.report import html
from resnet_bk.report.document import compose

SCRIPT = Path(resnet_bk.report.__file__).with_name("page.js")
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Tags in order, all attributes, all text; fails where an element ends that has not begun."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def document():
    return compose(report_of(failing=True))


@pytest.fixture(scope="module")
def text(document):
    return html.page(document)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_every_element_ends(page, text):
    assert page.open == [] and text.startswith("<!DOCTYPE html>")
    assert {"html", "head", "title", "body", "main", "table", "svg", "script"} <= set(page.tags)


def test_it_says_all_that_the_document_says(page, document):
    for line in said(document).splitlines():
        for cell in line.split(" | "):
            assert " ".join(cell.split()) in page.text
    for plot in plots(document):
        assert plot.caption in page.text


def test_every_id_is_there_once_and_every_reference_leads_to_one(page, text):
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 50
    referred = {value[1:] for _, name, value in page.attributes if name == "href" and value.startswith("#")}
    referred |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert len(referred) > 20 and referred <= set(ids)


def test_nothing_is_fetched_from_anywhere(page, text):
    for tag, name, value in page.attributes:
        if name in ("href", "src", "action", "data", "srcset", "poster"):
            assert value.startswith(("#", "data:")), (tag, name, value)
    assert "://" not in text and "@import" not in text
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'")


def test_every_plot_can_be_read_point_by_point(page, document):
    drawn = plots(document)
    assert len(drawn) >= 6 and all(marks(plot.svg) for plot in drawn)
    circles = sum(tag == "circle" and name == "class" and value == "mark" for tag, name, value in page.attributes)
    assert circles == sum(len(marks(plot.svg)) for plot in drawn)
    alternatives = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert alternatives == [plot.alternative for plot in drawn]


def test_it_has_colours_for_light_and_dark_and_for_paper(text):
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    inside = text.partition("<svg")[2]
    for colour in ("#000000", "#ffffff", "#e3e3e3"):
        assert colour not in inside
    assert "var(--ink)" in inside and "var(--grid)" in inside


def test_text_is_never_markup():
    report = report_of(label="</title><script>alert(1)</script>")
    evil = "<img src=x onerror=alert(1)> & &amp; </script><!-- "
    page = Page(html.page(compose(replace(report, workload=replace(report.workload, description=evil)))))
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert " ".join(evil.split()) in page.text


def test_the_same_report_gives_the_same_page(document, text):
    assert html.page(document) == text


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here")
def test_the_script_is_valid(text):
    subprocess.run(["node", "--check", str(SCRIPT)], check=True, capture_output=True, timeout=60)
    assert text.count("</script>") == 1 and SCRIPT.read_text(encoding="utf-8") in text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_a_browser_runs_it_offline_without_a_complaint(text, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(text, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--enable-logging=stderr", "--dump-dom"]
    ran = subprocess.run(["chromium", *flags, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in ran.stderr
    # The script has taken the titles over.
    assert ran.stdout.count('data-text="') == text.count('class="mark"') > 100
