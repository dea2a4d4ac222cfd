"""The PDF: what it says, what every page looks like, and that the same JSON gives the same bytes."""

import functools
import io
from dataclasses import replace

import pytest
from pypdf import PdfReader
from shown import cut_texts, marks, pages, plots, said
from synthetic import report_of

from resnet_bk.report import pdf
from resnet_bk.report.document import compose
from resnet_bk.report.figures import length_ticks

LONG = "a_function_of_a_user_with_a_very_long_name_indeed"
KINDS = {
    "three seeds": {},
    "all that can go wrong": {"failing": True},
    "one seed": {"seeds": 1},
    "a foreign baseline": {"foreign": True, "contestants": 2, "label": LONG},
    "more than a page of findings": {"failing": True, "label": LONG, "failures": 40},
    "two sections": {"sections": ("flops", "scaling")},
    "nothing": {"sections": ()},
}


@functools.cache  # its plots take seconds
def document_of(kind):
    return compose(report_of(**KINDS[kind]))


def text_of(content):
    return [" ".join(page.extract_text().split()) for page in PdfReader(io.BytesIO(content)).pages]


@pytest.fixture(scope="module")
def pdf_text():
    return " ".join(text_of(pdf.typeset(document_of("three seeds")))).replace("’", "'")


@pytest.mark.parametrize(
    "words",
    [
        "ResNet-BK against Transformer",
        "1. Findings",
        "Contents",
        "2. Floating-point operations",
        "3. Wall-clock time",
        "4. Memory",
        "5. Convergence",
        "7. Numerical stability",
        "8. How this report was made",
        "resnet-bk bench --profile standard --preset seed --data 'my books/*.txt'",
        "AMD EPYC, 2 cores",
        "torch 2.13.0+cpu",
        "10ebb4950779",
        "preset seed",
    ],
)
def test_the_pdf_says(pdf_text, words):
    assert words in pdf_text


def test_what_is_written_in_a_plot_can_be_selected_too(pdf_text):
    assert "milliseconds" in pdf_text and "tokens trained on" in pdf_text


@pytest.mark.parametrize("kind", KINDS)
def test_the_findings_fill_the_first_page_and_no_more(kind):
    first, second, *_ = text_of(pdf.typeset(document_of(kind)))
    assert "1. Findings" in first and "Contents" not in first
    assert second.partition("Contents")[0].count(" ") < 15  # only the running head is before it


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaves_a_page_and_no_page_is_empty(kind):
    for number, page in enumerate(pages(document_of(kind)), start=1):
        height, width = page.shape
        margin, foot = int(width * 1.6 / 21), int(height * 1.0 / 29.7)
        assert page[:, :margin].min() > 250, f"page {number} is too wide on the left"
        assert page[:, -margin:].min() > 250, f"page {number} is too wide on the right"
        assert page[:foot].min() > 250 and page[-foot:].min() > 250, f"page {number} is too long"
        assert page[2 * foot : -3 * foot].min() < 200, f"page {number} is empty"


@pytest.mark.parametrize("kind", KINDS)
def test_no_plot_is_empty_and_no_label_is_cut(kind):
    for plot in plots(document_of(kind)):
        assert marks(plot.svg), plot.caption
        assert not list(cut_texts(plot.svg)), plot.caption


def test_the_file_is_small_and_the_same_every_time():
    document = document_of("all that can go wrong")
    content = pdf.typeset(document)
    assert len(content) < 2_000_000
    assert pdf.typeset(document) == content


def test_sections_that_were_not_measured_are_left_out():
    titles = [section.title for section in document_of("two sections").sections]
    assert len(titles) == 4 and titles[0] == "Findings" and titles[-1] == "How this report was made"
    assert "Not measured: timing, memory, convergence and stability." in said(document_of("two sections"))


def test_the_cells_and_what_became_of_them_stand_at_the_end():
    shown = said(document_of("all that can go wrong"))
    assert "scaling | 4 | 2 | 87 | 0.4%" in shown
    assert "scaling/num_experts | timeout: stopped after 900 s | 31 | 0.1%" in shown
    assert "timing/build-1 | measured while others used the machine | 13 | 21.0%" in shown
    assert "No cell was measured." in said(compose(replace(report_of(), cells={})))


def test_a_foreign_model_is_told_by_what_it_was_made_of():
    document = document_of("a foreign baseline")
    assert document.title == "ResNet-BK against a_function_of_a_…ong_name_indeed"
    shown = said(document)
    assert "made of | preset seed | hf:/data/models/checkpoints/a-long-folder-name" in shown
    assert "num_resolvent_heads | 4 | \n" in shown and "num_attention_heads" not in shown


def test_text_is_shown_as_it_is_and_never_as_markup():
    evil = '#panic("no") *bold* $x$ _u_ @ref <label> \\ // end'
    report = report_of(sections=())
    content = pdf.typeset(compose(replace(report, workload=replace(report.workload, description=evil))))
    shown = " ".join(text_of(content)).replace("“", '"').replace("”", '"')
    assert '#panic("no") *bold* $x$ _u_ @ref <label>' in shown


def test_no_word_is_marked_up_for_another_medium():
    for kind in KINDS:
        assert "`" not in said(document_of(kind))


def test_the_lengths_on_the_axis_are_those_measured():
    from matplotlib.figure import Figure

    axis = Figure().subplots().xaxis
    for lengths, shown in (
        ([128, 256, 512, 1024, 2048, 4096], ["128", "256", "512", "1,024", "2,048", "4,096"]),
        ([2**k for k in range(7, 15)], ["256", "1,024", "4,096", "16,384"]),
    ):
        length_ticks(axis, lengths)
        ticks = axis.get_major_locator().tick_values(1, 1)
        assert [axis.get_major_formatter()(tick, 0) for tick in ticks] == shown
