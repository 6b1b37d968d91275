"""report.html in a real browser: nothing overflows, nothing is loaded, and it shows on light and dark pages alike."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evaluations import HOSTILE, build_evaluation
from stillroom.evaluate.report.page import rebuild

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no chromium here (Debian: apt-get install chromium)")

MEASURE = """
<script>
document.querySelectorAll("details").forEach(one => one.open = true);
const outside = [...document.querySelectorAll("figure .draw > svg")].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(text => {
    const box = text.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1;
  }).map(text => text.textContent);
});
const scores = [...document.querySelectorAll("#benchmarks > .wide tbody tr:first-child td.n:not(.minor)")];
const lines = cell => {
  const texts = document.createRange();
  texts.selectNodeContents(cell);
  const feet = [...texts.getClientRects()].map(box => box.bottom).sort((a, b) => a - b);
  return feet.filter((foot, i) => i == 0 || foot - feet[i - 1] > 6).length;
};
addEventListener("load", () => document.body.append(Object.assign(document.createElement("pre"), {
  id: "measured",
  textContent: JSON.stringify({
    width: document.documentElement.scrollWidth, window: innerWidth, outside,
    widest: Math.max(0, ...scores.map(cell => cell.offsetWidth)),
    seen: scores.filter(cell => cell.getBoundingClientRect().right <= innerWidth).length,
    lines: Math.max(0, ...[...document.querySelectorAll("td.n")].map(lines)),
    loaded: performance.getEntriesByType("resource").map(one => one.name),
  }),
})));
</script>
"""
EVERY_NAME = ("teacher", "distilled", "distilled-of-a-long-name-2026-11-25", "baseline", "another", "of-somebody-else")
PAPER = 688
"""The width of A4 between the margins, 182 mm, in CSS pixels."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages as they come in practice, with much in them, and with what does harm."""
    settings: dict[str, dict[str, Any]] = {
        "usual": {},
        "full": {"names": EVERY_NAME, "num_tasks": 12},
        "hostile": {"names": EVERY_NAME, "suffix": HOSTILE},
        "empty": {"names": ("gpt",), "num_tasks": 0, "text": False},
    }
    found = {}
    for name, some in settings.items():
        folder = tmp_path_factory.mktemp(name)
        build_evaluation(folder, **some)
        found[name] = rebuild(folder)[1]
    return found


def browse(page: Path, *words: str, width: int = 1200, height: int = 2400) -> str:
    settings = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
                "--disable-background-networking", f"--user-data-dir={page.parent / 'profile'}",
                f"--window-size={width},{height}"]  # fmt: skip
    done = subprocess.run(
        [str(BROWSER), *settings, *words, page.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def measure(page: Path, width: int, more: str = "", paper: bool = False) -> dict[str, Any]:
    """What the page measures of itself, with all its parts open; without its policy, which lets no script run.

    Args:
        paper: by its rules for print.
    """
    text, number = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    assert number == 1
    if paper:
        text = text.replace("@media screen", "@media print and screen").replace("@media print {", "@media all {")
    copy = page.with_name("measured.html")
    copy.write_text(text.replace("</body>", f"{more}{MEASURE}</body>"), encoding="utf-8")
    dom = browse(copy, "--dump-dom", "--virtual-time-budget=5000", width=width)
    found = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, dom[-500:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("width", [1200, 500])
@pytest.mark.parametrize("name", ["usual", "full", "hostile", "empty"])
def test_nothing_overflows_and_nothing_is_loaded(reports, name, width):
    found = measure(reports[name], width)
    assert found["window"] == width
    assert found["width"] <= width
    assert found["outside"] == [], "text beyond the edge of its chart"
    assert found["loaded"] == []


@pytest.mark.parametrize("name", ["full", "usual"])
def test_nothing_is_cut_off_on_paper(reports, name):
    found = measure(reports[name], PAPER, paper=True)
    assert found["width"] <= PAPER
    assert found["lines"] <= 3, "of a number, its error and its interval"


def test_long_names_and_narrow_pages_leave_room_for_the_scores(reports):
    assert measure(reports["full"], 1200)["widest"] <= 140
    assert measure(reports["full"], 500)["seen"] >= 2


def test_the_measure_sees_what_it_looks_for(reports):
    wide = '<img src="http://127.0.0.1:9/x.png"><div style="width: 3000px">wide</div>'
    found = measure(reports["empty"], 1200, wide)
    assert found["loaded"] == ["http://127.0.0.1:9/x.png"]
    assert found["width"] >= 3000


def test_light_and_dark(reports, tmp_path):
    ground = {}
    for name, words in (("light", []), ("dark", ["--blink-settings=preferredColorScheme=0"])):
        file = tmp_path / f"{name}.png"
        browse(reports["usual"], *words, f"--screenshot={file}")
        image = Image.open(file).convert("RGB")
        assert image.size == (1200, 2400)
        colours = {colour for _, colour in image.getcolors(1 << 20) or []}
        bars = {"light": ("2f9e5b", "7a4fd0", "f2c230"), "dark": ("45b873", "9b78ec", "f2c84b")}[name]
        assert {tuple(bytes.fromhex(bar)) for bar in bars} <= colours, "teacher, distilled and baseline have their bars"
        ground[name] = image.getpixel((5, 5))
    assert ground == {"light": (255, 255, 255), "dark": (0x17, 0x15, 0x1F)}


def test_print(reports, tmp_path):
    file = tmp_path / "report.pdf"
    browse(reports["usual"], "--no-pdf-header-footer", f"--print-to-pdf={file}")
    assert file.read_bytes().startswith(b"%PDF-")
