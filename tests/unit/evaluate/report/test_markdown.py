"""report.md: the same content as a text, with the numbers of the charts as tables."""

from itertools import takewhile
from pathlib import Path

import pytest

from evaluations import HOSTILE, build_evaluation
from stillroom.evaluate.report.content import make_report
from stillroom.evaluate.report.page import code, escaped, to_markdown


def markdown(folder: Path, **settings) -> str:
    results = build_evaluation(folder, **settings)
    return to_markdown(make_report(results, folder))


def test_it_has_the_numbers_of_the_page(tmp_path):
    text = markdown(tmp_path)
    assert (
        "- **recovered gap** (of the gap in cross-entropy between baseline and teacher): distilled 64.4 ± 2.0 %\n"
        in text
    )
    assert "| KL to the teacher | nats a token | lower | – | 0.156 ± 0.011 \\[0.134 to 0.178\\] |" in text
    assert "leaderboard\\_mmlu\\_pro failed: the task's data could not be fetched" in text
    assert "the teacher's is 1.4000" in text
    assert "| 128–255 | 612 | 0.950 | 1.050 |" in text
    assert "Of 8 items distilled has 3 right that baseline has wrong, and 2 wrong that baseline has right." in text
    assert "```\nstillroom evaluate models.teacher=teacher models.distilled=runs/distilled/model out=x\n```" in text


def test_every_row_of_a_table_has_as_many_cells_as_its_head(tmp_path):
    lines = markdown(tmp_path, names=("teacher", "distilled", "baseline", "other"), suffix=HOSTILE).splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("| ---")]
    assert len(heads) >= 10
    for i in heads:
        cells = lines[i].count("|")
        rows = [lines[i - 1], *takewhile(bool, lines[i:])]
        assert {row.replace("\\|", "").count("|") for row in rows} == {cells}


def test_names_from_files_are_no_markup(tmp_path):
    text = markdown(tmp_path, suffix=HOSTILE)
    outside = "".join(text.split("```")[::2])
    assert "<script" not in outside
    assert "<img" not in outside
    assert "\x1b" not in text
    assert "\u202e" not in text


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("a|b\nc", "a\\|b c"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("*_`[x](y)", "\\*\\_\\`\\[x\\](y)"),
        ("\x07\u202e日本", "⟨U+0007⟩⟨U+202E⟩日本"),
    ],
)
def test_escaping(given, wanted):
    assert escaped(given) == wanted


def test_a_block_of_code_ends_where_it_should():
    assert code("a ``` b") == "````\na ``` b\n````"


def test_passages_name_the_nats_of_their_worst_tokens(tmp_path):
    text = markdown(tmp_path)
    assert "⟨" in text.partition("## Worst passages")[2].partition("##")[2]


def test_marked_tokens_are_bold_whatever_stands_beside_them(tmp_path):
    """Asterisks between a word and punctuation would be no emphasis."""
    results = build_evaluation(tmp_path, num_tasks=0)
    tokens = ("loc", "als", "(*", ")", "<b>", " ", "\t", "\r\n", "\n  ", "a ", "", ".")
    passage = results.worst["distilled"][0]

    def shown(nats: float) -> str:
        one = passage.model_copy(update={"tokens": tokens, "kl_nats": (0.0, *[nats] * 10, 0.0)})
        text = to_markdown(make_report(results.model_copy(update={"worst": {"distilled": (one,)}}), tmp_path))
        return text.partition("> … ")[2].partition(" …\n")[0]

    assert shown(0.5) == "locals(\\*)&lt;b&gt;  ↵↵ a ∅."
    assert shown(2.0).replace("⟨2.0⟩", "") == (
        "loc<b>als</b><b>(\\*</b><b>)</b><b>&lt;b&gt;</b> <b>␣</b> <b>␣</b><b>↵</b><b>↵</b> <b>a</b> <b>∅</b>."
    )


def test_differences_and_failures_stand_with_what_they_are_of(tmp_path):
    text = markdown(tmp_path)
    benchmarks, _, distance = text.partition("## Benchmarks")[2].partition("## Distance to the teacher")
    assert benchmarks.startswith("\n\n- leaderboard\\_mmlu\\_pro failed: ")
    assert "| blimp acc\\_norm | distilled beats" in benchmarks
    assert "| KL to the teacher | distilled beats" not in benchmarks
    assert "| KL to the teacher | distilled beats" in distance.partition("##")[0]


def test_a_model_that_is_nowhere_far_from_the_teacher(tmp_path):
    results = build_evaluation(tmp_path, num_tasks=0)
    near = results.worst["distilled"][0].model_copy(update={"mean_kl_nats": 0.0})
    text = to_markdown(make_report(results.model_copy(update={"worst": {"distilled": (near,)}}), tmp_path))
    assert "### distilled\n\nNone: no passage is 0.01 nats a token or more from the teacher.\n" in text
