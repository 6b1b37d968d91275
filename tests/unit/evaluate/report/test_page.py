"""report.html: one file that loads nothing, takes nothing from files for its own language, and shows what was found."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from evaluations import HOSTILE, build_evaluation
from stillroom.evaluate.report import charts
from stillroom.evaluate.report.charts import PAINTS
from stillroom.evaluate.report.page import HERE, write_report
from stillroom.evaluate.results import Results

EVERY_NAME = ("teacher", "distilled", "distilled-2", "baseline", "other")


class Reader(HTMLParser):
    """Elements, their attributes, ids and texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if "style" not in self.open:
            self.text += data

    def all(self, key: str) -> list[str | None]:
        return [attributes[key] for _, attributes in self.elements if key in attributes]


def page(folder: Path, **settings) -> tuple[Results, Reader, str]:
    results = build_evaluation(folder, **settings)
    _, path = write_report(results, folder)
    text = path.read_text(encoding="utf-8")
    return results, Reader(text), text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[Results, Reader, str]:
    return page(tmp_path_factory.mktemp("hostile"), names=EVERY_NAME, suffix=HOSTILE)


def test_names_and_tokens_from_files_are_text(hostile):
    _, reader, text = hostile
    assert not reader.open, "an element was never closed, or closed by what a file holds"
    tags = {tag for tag, _ in reader.elements}
    assert not tags & {"script", "img", "iframe", "object", "link", "base", "form"}
    assert not [key for _, attributes in reader.elements for key in attributes if key.startswith("on")]
    assert "alert('x')</script>" in reader.text, "it is shown as it is"
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text)


def test_nothing_is_loaded(hostile):
    _, reader, text = hostile
    policy = next(a["content"] for tag, a in reader.elements if tag == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert not reader.all("src")
    assert all(str(target).startswith("#") for key in ("href", "xlink:href") for target in reader.all(key))
    assert not re.search(r"@import|url\((?!#)", text)


def test_ids_are_unique_and_links_within_the_page_lead_to_them(hostile):
    _, reader, text = hostile
    ids = reader.all("id")
    assert len(ids) == len(set(ids))
    targets = [str(target)[1:] for key in ("href", "xlink:href") for target in reader.all(key)]
    targets += re.findall(r"url\(#([^)]*)\)", text)
    targets += [one for names in reader.all("aria-labelledby") for one in str(names).split()]
    assert targets
    assert set(targets) <= set(ids)


def test_every_chart_is_told_in_words(hostile):
    _, reader, _ = hostile
    pictures = [attributes for tag, attributes in reader.elements if attributes.get("role") == "img"]
    assert len(pictures) == 4
    assert [tag for tag, _ in reader.elements].count("desc") == 4


def test_charts_are_in_the_pages_own_colours(hostile):
    _, _, text = hostile
    svg = "".join(re.findall(r"<svg .*?</svg>", text, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}", svg), "a colour that stays the same on a dark page"
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used <= set(re.findall(r"(--[\w-]+):", text))
    assert "DejaVu Sans'" not in svg


def test_the_numbers_that_are_read_first(tmp_path):
    _, reader, _ = page(tmp_path)
    text = " ".join(reader.text.split())
    assert "How much of the teacher did the student keep?" in text
    assert "64.4 ± 2.0 % distilled" in text
    assert "82.65 ± 0.17 % distilled 70.30 ± 0.17 % baseline" in text
    assert "0.156 ± 0.011 distilled 0.312 ± 0.011 baseline" in text
    assert "KL to the teacher: distilled beats baseline by 0.21, 95 % interval 0.16 to 0.26" in text
    assert "leaderboard_mmlu_pro failed: the task's data could not be fetched" in text
    assert "blimp, baseline → distilled: 3 gained, 2 lost of 8" in text
    assert "stillroom evaluate models.teacher=teacher" in text


def test_differences_stand_with_what_they_are_of(tmp_path):
    _, _, text = page(tmp_path)
    sections = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', text, re.DOTALL))
    assert '<td class="">distilled beats' in sections["benchmarks"]
    assert '>KL to the teacher</th><td class="">distilled beats' in sections["distance"]
    assert "blimp" not in sections["distance"]


def test_a_model_that_is_nowhere_far_from_the_teacher(tmp_path):
    results = build_evaluation(tmp_path, num_tasks=0)
    near = results.worst["distilled"][0].model_copy(update={"mean_kl_nats": 0.0})
    write_report(results.model_copy(update={"worst": {"distilled": (near,)}}), tmp_path)
    reader = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "distilled: none; no passage is 0.01 nats a token or more from the teacher." in reader.text
    assert "1 passage" not in reader.text


def test_what_a_narrow_page_leaves_out_is_in_the_table_of_benchmarks_alone(tmp_path):
    _, _, text = page(tmp_path)
    heads = re.findall(r'<th scope="col" class="[^"]*minor">(.*?)</th>', text)
    assert heads == ["version", "shots", "items"]
    num_rows = 3
    assert text.count('minor">') == len(heads) * (1 + num_rows)


def test_places_are_by_what_was_read_before(tmp_path):
    _, reader, _ = page(tmp_path)
    assert reader.text.count("by the tokens read before it") == 3
    assert "place in the document" not in reader.text


def test_a_task_has_its_raw_score_beside_the_normalised_one(tmp_path):
    _, reader, _ = page(tmp_path)
    text = " ".join(reader.text.split())
    assert "blimp1acc_norm0880.0 % ± 2.8 [74.5 to 85.5]" in text
    assert "normalised60.0 % ± 5.6" in text


def test_a_refused_metric_has_its_reason(tmp_path):
    _, reader, _ = page(tmp_path, names=("teacher", "distilled", "baseline", "other"))
    assert "other: its tokenizer is not that of teacher" in reader.text


def test_tokens_are_shaded_by_their_kl(tmp_path):
    results, reader, _ = page(tmp_path)
    passage = results.worst["distilled"][0]
    shades = [a for tag, a in reader.elements if tag == "span" and "title" in a and str(a["title"]).endswith(" nats")]
    for nats, attributes in zip(passage.kl_nats, shades, strict=False):
        assert attributes["title"] == f"{nats:.2f} nats"
        level = sum(nats >= start for start in (0.1, 0.5, 1, 2, 4))
        assert attributes["class"] == f"k k{level}"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_tasks": 0}, "No benchmark was asked for"),
        ({"text": False}, "No held-out text was read"),
        ({"names": ("gpt",), "num_tasks": 0}, "Models side by side"),
        ({"names": ("teacher", "distilled")}, "teacher → distilled"),
    ],
)
def test_what_was_not_measured_is_said(tmp_path, settings, said):
    _, reader, _ = page(tmp_path, **settings)
    assert said in reader.text
    assert not reader.open


# --- colours ---------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_texts_and_lines_stand_out_from_their_grounds(dark):
    """WCAG AA: 4.5 for text, 3 for what a chart is made of."""
    style = (HERE / "style.css").read_text(encoding="utf-8")
    light, _, rest = style.partition("@media screen and (prefers-color-scheme: dark)")
    values = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light))
    if dark:
        values |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", rest))
    for ground in ("paper", "card"):
        for text in ("ink", "muted", "accent", "good", "bad"):
            assert contrast(values[text], values[ground]) >= 4.5, (text, ground)
    on = {1: "ink", 2: "ink", 3: "on-3", 4: "on-4", 5: "on-5"}
    for level, text in on.items():
        assert contrast(values[text], values[f"shade-{level}"]) >= 4.5, level
    shades = [luminance(values["paper"]), *(luminance(values[f"shade-{level}"]) for level in on)]
    assert shades == sorted(shades, reverse=not dark), "the shades are a scale without their colour, too"
    for paints in PAINTS.values():
        for paint in paints:
            assert contrast(paint.line[dark], values["paper"]) >= 3


def test_the_page_needs_the_plotting_library_and_markdown_does_not(tmp_path, monkeypatch):
    from stillroom.errors import MissingError

    def absent() -> None:
        raise MissingError("the package `matplotlib` is not installed", why="It is optional.", fix="Install it.")

    monkeypatch.setattr(charts, "check", absent)
    with pytest.raises(MissingError, match=r"report\.md is written") as caught:
        write_report(build_evaluation(tmp_path), tmp_path)
    assert caught.value.fix == f"Install it. Then run `stillroom report {tmp_path}`."
    assert (tmp_path / "report.md").is_file()
    assert not (tmp_path / "report.html").exists()
