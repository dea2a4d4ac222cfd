"""From JSON to PDF: what it says, that it says losses too, and that damaged input is refused."""

import json
import random
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from pypdf import PdfReader

from resnet_bk.errors import UserError
from resnet_bk.report import summary
from resnet_bk.report.blocks import Bullets, Note, Table
from resnet_bk.report.document import compose
from resnet_bk.report.figures import length_ticks
from resnet_bk.report.pdf import write_pdf
from resnet_bk.report.sections import convergence as convergence_section
from resnet_bk.schema import Check, Interval, PhaseRatio, Results, SectionStatus, read_report, to_json


@pytest.fixture(scope="module")
def report(smoke_report):
    return smoke_report[0]


@pytest.fixture(scope="module")
def pdf_text(smoke_report, tmp_path_factory):
    _, path = smoke_report
    out = write_pdf(path, tmp_path_factory.mktemp("pdf") / "report.pdf")
    return " ".join(" ".join(page.extract_text() for page in PdfReader(out).pages).split())


def save(report, path):
    path.write_text(json.dumps(to_json(report)))
    return path


def texts(section):
    for block in section.blocks:
        if isinstance(block, Bullets):
            yield from block.items
        elif isinstance(block, Table):
            yield from (" | ".join(row) for row in block.rows)
        else:
            yield getattr(block, "text", "")


@pytest.mark.parametrize(
    "words",
    [
        "Contents",
        "1. Summary",
        "2. Floating-point operations",
        "3. Wall-clock time",
        "4. Memory",
        "5. Convergence",
        "6. Scaling with sequence length",
        "7. Numerical stability",
        "8. How this report was made",
        "Seed's mixer (bidirectional) is a leak, not skill",
        "One seed",
        "the planner’s prediction",
        "resnet-bk bench --profile smoke",
        "its figures mean nothing",
        "ResNet-BK mixes by keys and values carried by the resolvent behind a short convolution over 4 tokens",
        "the Transformer by attention with rotary positions behind a short convolution over 4 tokens",
        "Seed's mixer (the resolvent's diagonal as features;",
    ],
)
def test_the_pdf_says(pdf_text, words):
    assert words.replace("’", "'") in pdf_text.replace("’", "'")


def test_the_pdf_names_machine_versions_and_commit(pdf_text, report):
    environment = report.environment
    assert environment["packages"]["torch"] in pdf_text
    assert environment["python"] in pdf_text
    assert (environment["commit"] or "not run from a checkout") in pdf_text


def test_the_same_json_gives_the_same_bytes(smoke_report, tmp_path):
    _, path = smoke_report
    first, second = (write_pdf(path, tmp_path / name).read_bytes() for name in ("a.pdf", "b.pdf"))
    assert first == second


@pytest.mark.parametrize(
    ("low", "value", "high", "words"),
    [
        (1.2, 1.3, 1.4, "ResNet-BK is 1.30 times faster"),
        (0.4, 0.5, 0.6, "Transformer is 2.00 times faster"),
        (0.9, 1.1, 1.2, "no difference that this measurement can see"),
    ],
)
def test_the_summary_follows_the_interval(report, low, value, high, words):
    ratios = [
        PhaseRatio(phase=row.phase, ratio=Interval(value=value, low=low, high=high))
        for row in report.results.timing.ratios
    ]
    changed = replace(report, results=replace(report.results, timing=replace(report.results.timing, ratios=ratios)))
    said = "\n".join(texts(summary.build(changed)))
    assert words in said
    assert ("ResNet-BK is slower than the Transformer" in said) == (high < 1)


def test_the_summary_says_who_is_ahead_either_way(report):
    convergence = report.results.convergence
    for swapped in (False, True):
        losses = {"resnet-bk": 2.0, "transformer": 3.0} if not swapped else {"resnet-bk": 3.0, "transformer": 2.0}
        arms = [
            replace(arm, validation=[replace(arm.validation[-1], loss=losses[arm.key])]) if arm.key in losses else arm
            for arm in convergence.arms
        ]
        three = replace(convergence, arms=arms, seeds=[0, 1, 2])
        changed = replace(report, results=replace(report.results, convergence=three))
        said = "\n".join(texts(summary.build(changed)))
        assert f"{'Transformer' if swapped else 'ResNet-BK'} is ahead by 1.000" in said


def test_one_seed_without_a_sweep_claims_nothing(report):
    said = "\n".join(texts(summary.build(report)))
    assert "one seed and learning rates that are not tuned this does not say which model learns better" in said
    assert "is ahead" not in said
    section = convergence_section.build(report, report.results.convergence)
    shown = "\n".join(texts(section))
    assert "fixed beforehand" in shown and "No model is tuned here" in shown
    assert "tried" not in shown


@pytest.mark.parametrize(
    ("at_the_edge", "words"), [(1, "The best rate of A is the"), (2, "The best rates of A and B are")]
)
def test_the_sentence_about_rates_agrees_with_their_number(report, at_the_edge, words):
    convergence = report.results.convergence
    arms = [
        replace(arm, label=label, learning_rate=0.1 if place < at_the_edge else 0.2)
        for place, (arm, label) in enumerate(zip(convergence.arms, "ABCDE", strict=True))
    ]
    changed = replace(convergence, arms=arms, learning_rates=[0.1, 0.2, 0.3])
    assert words in "\n".join(texts(convergence_section.build(report, changed)))


def test_no_word_is_marked_up_for_another_medium(report):
    shown = "\n".join(text for section in compose(report).sections for text in texts(section))
    assert "`" not in shown


def test_the_lengths_on_the_axis_are_those_measured(report):
    axis = Figure().subplots().xaxis
    for lengths, shown in (
        ([128, 256, 512, 1024, 2048, 4096], ["128", "256", "512", "1,024", "2,048", "4,096"]),
        ([2**k for k in range(7, 15)], ["256", "1,024", "4,096", "16,384"]),
    ):
        length_ticks(axis, lengths)
        ticks = axis.get_major_locator().tick_values(1, 1)
        assert [axis.get_major_formatter()(tick, 0) for tick in ticks] == shown


def test_a_diverged_run_is_said_and_not_averaged(report, tmp_path):
    convergence = report.results.convergence
    arms = [
        replace(arm, validation=[*arm.validation[:-1], replace(arm.validation[-1], loss=None)])
        if arm.key == "transformer"
        else arm
        for arm in convergence.arms
    ]
    changed = replace(report, results=replace(report.results, convergence=replace(convergence, arms=arms)))
    assert "diverged" in "\n".join(texts(summary.build(changed)))
    write_pdf(save(changed, tmp_path / "report.json"), tmp_path / "report.pdf")


def test_failed_and_missing_sections_are_named(report, tmp_path):
    status = {"flops": SectionStatus(seconds=1.0, failure="RuntimeError: no formula")}
    changed = replace(report, status=status, results=Results())
    notes = [block.text for block in compose(changed).sections[0].blocks if isinstance(block, Note) and block.grave]
    assert any("RuntimeError: no formula" in note and "timing" in note for note in notes)
    write_pdf(save(changed, tmp_path / "report.json"), tmp_path / "report.pdf")


def test_a_failed_gate_is_the_first_thing_said(report, tmp_path):
    gates = [Check(name="ResNet-BK: no logit depends on a later token", measured=0.1, limit=1e-10, passed=False)]
    changed = replace(report, gates=gates, status={}, results=Results())
    out = write_pdf(save(changed, tmp_path / "report.json"), tmp_path / "report.pdf")
    assert "A gate failed, so nothing was measured" in " ".join(PdfReader(out).pages[0].extract_text().split())


def test_a_planner_that_promised_too_little_is_called_a_defect(report):
    memory = report.results.memory
    models = [replace(model, predicted_peak=model.peak_step // 2) for model in memory.models]
    changed = replace(report, results=replace(report.results, memory=replace(memory, models=models)))
    said = [text for section in compose(changed).sections for text in texts(section)]
    assert any("defect of the planner" in text for text in said)


def test_text_is_shown_as_it_is_and_never_as_markup(report, tmp_path):
    evil = '#panic("no") *bold* $x$ _u_ @ref <label> \\ // end'
    changed = replace(report, workload=replace(report.workload, description=evil))
    out = write_pdf(save(changed, tmp_path / "report.json"), tmp_path / "report.pdf")
    shown = " ".join(" ".join(page.extract_text() for page in PdfReader(out).pages).split())
    assert '#panic("no") *bold* $x$ _u_ @ref <label>' in shown.replace("“", '"').replace("”", '"')


def damaged(text):
    document = json.loads(text)
    yield "cut short", text[: len(text) // 2]
    yield "empty", ""
    yield "not JSON", "{nonsense"
    yield "a list", "[]"
    yield "another kind", json.dumps({**document, "kind": "shopping list"})
    yield "another version", json.dumps({**document, "version": 99})
    yield "without workload", json.dumps({key: value for key, value in document.items() if key != "workload"})
    yield "one contestant", json.dumps({**document, "contestants": document["contestants"][:1]})
    yield "a word for a number", text.replace('"batch_size": 4', '"batch_size": "four"', 1)
    yield "without its machine", json.dumps({**document, "environment": {}})
    yield "no phases", changed(document, [], "results", "timing", "phases")
    yield "a phase fewer", changed(document, document["results"]["timing"]["phases"][2:], "results", "timing", "phases")
    yield "a length of 0", changed(document, 0, "results", "scaling", "points", 0, "sequence_length")
    yield "a negative time", changed(document, -1.0, "results", "timing", "phases", 0, "seconds", "median")
    yield "no points", changed(document, [], "results", "scaling", "points")
    yield "no curve", changed(document, [], "results", "convergence", "arms", 0, "validation")
    yield "a stranger", changed(document, "gpt", "contestants", 1, "key")
    yield "a stranger's arm", changed(document, "gpt", "results", "convergence", "arms", 0, "key")


def changed(document, value, *place):
    """The document as JSON with another value at a place."""
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return json.dumps(copy)


def places(value, path=()):
    """Where every list, object and leaf of a document is."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@pytest.mark.slow
def test_no_value_at_any_place_ends_in_a_traceback(smoke_report, tmp_path, monkeypatch):
    document = json.loads(smoke_report[1].read_text())
    chance = random.Random(0)
    values = [0, -1, 1e300, 10**18, "", "text", [], {}, None, [[]], True]
    path = tmp_path / "report.json"
    for place in chance.sample(list(places(document)), 60):
        value = chance.choice(values)
        path.write_text(changed(document, value, *place))
        try:
            write_pdf(path, tmp_path / "report.pdf")
        except UserError as error:
            assert "\n" not in str(error), (place, value)


def test_damaged_json_is_one_clear_line(smoke_report, tmp_path):
    text = smoke_report[1].read_text()
    for name, content in damaged(text):
        path = tmp_path / "report.json"
        path.write_text(content)
        with pytest.raises(UserError) as caught:
            write_pdf(path, tmp_path / "report.pdf")
        assert "\n" not in str(caught.value), name
        assert "resnet-bk bench" in str(caught.value) or "make it again" in str(caught.value), name
        assert not (tmp_path / "report.pdf").exists(), name


def test_a_missing_report_and_a_strange_name_are_refused(smoke_report, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_report(tmp_path / "nothing.json")
    with pytest.raises(UserError, match=r"does not end in \.pdf"):
        write_pdf(smoke_report[1], tmp_path / "report.docx")


def test_what_describes_the_machine_is_shown_whatever_it_is(smoke_report, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(changed(json.loads(smoke_report[1].read_text()), -1, "environment", "commit"))
    write_pdf(path, tmp_path / "report.pdf")
