"""What README and the guide say can be done: commands that parse, recipes that load, links that lead somewhere."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from stillroom.capture.config import CaptureConfig
from stillroom.cli.arguments import parse
from stillroom.cli.main import VERBS
from stillroom.config import Config, explain, load
from stillroom.distill.config import DistillConfig
from stillroom.evaluate.config import EvaluateConfig
from stillroom.prune.config import PruneConfig
from stillroom.recipe import from_yaml

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


COMMANDS = [
    shlex.split(line, comments=True)
    for page in PAGES
    for block in [*blocks(page, "bash"), *blocks(page, "")]
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith(("make ", "stillroom "))
]


def test_there_are_commands_to_try():
    assert ["make", "demo"] in COMMANDS
    assert sum(words[0] == "stillroom" for words in COMMANDS) >= 3


def test_the_tree_names_every_module_and_package_and_no_other():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("src/stillroom/\n")[2].partition("\ntests/")[0]
    named = set(re.findall(r"[a-z_]+(?:\.py|/)", tree))
    named -= {"config.py", "plan.py", "run.py"}
    there = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "src/stillroom").iterdir()}
    hidden = {name for name in there if name.startswith("_")}
    assert named | {"config.py"} == there - hidden


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] == "make"], ids=" ".join)
def test_every_make_target_is_there(words):
    done = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] == "stillroom"], ids=" ".join)
def test_every_command_line_means_something(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("STILLROOM_DATA", "data")
    arguments = parse(words[1:], tuple(VERBS))
    assert arguments.verb in VERBS
    if arguments.recipe is not None and arguments.recipe != "recipe.yaml":  # the guide's stand-in for the reader's own
        verbs = {"capture": CaptureConfig, "distill": DistillConfig, "doctor": DistillConfig,
                 "evaluate": EvaluateConfig, "prune": PruneConfig}  # fmt: skip
        settings = verbs[arguments.verb]
        assert isinstance(load(settings, arguments.recipe, arguments.overrides), Config)


def test_the_recipe_in_the_readme_is_a_recipe_and_agrees_with_the_file(tmp_path):
    (text,) = blocks(ROOT / "README.md", "yaml")
    (tmp_path / "readme.yaml").write_text(text, encoding="utf-8")
    shown = load(DistillConfig, tmp_path / "readme.yaml", ["out=x"])
    whole = load(DistillConfig, ROOT / "recipes" / "qwen2-7b-to-1.5b-logits.yaml", ["out=x"])
    for key, value in from_yaml(text).items():
        settings = getattr(whole, key)
        if isinstance(value, dict):
            for name in value:
                assert getattr(settings, name) == getattr(getattr(shown, key), name), f"{key}.{name}"
        else:
            assert settings == getattr(shown, key), key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_the_reference_of_settings_is_that_of_the_code():
    """`make docs` writes it."""
    verbs = (
        ("distill", DistillConfig),
        ("capture", CaptureConfig),
        ("evaluate", EvaluateConfig),
        ("prune", PruneConfig),
    )
    for verb, settings in verbs:
        text = (ROOT / "docs" / "guide" / f"{verb}-settings.txt").read_text(encoding="utf-8")
        assert text.endswith(f"\n\n{explain(settings)}\n")
