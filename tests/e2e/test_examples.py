"""Every example is short, and the demo runs, stops and goes on."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stillroom.evaluate.results import Results
from stillroom.runs import read_json

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
SETTINGS = ("steps=2", "batch.tokens=256", "data.max_documents=20", "held_out.max_documents=2")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_fits_on_a_page(path):
    assert len(path.read_text().splitlines()) <= 60


def test_the_demo_stops_goes_on_and_is_done(tmp_path, environment):
    words = [sys.executable, str(FOLDER / "demo.py"), str(tmp_path / "demo"), *SETTINGS]

    def demo() -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, check=True, capture_output=True, text=True, env=environment, timeout=300)

    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if line.startswith("hard labels:"):
                run.send_signal(signal.SIGINT)
                break
        rest = run.stderr.read()
    assert run.returncode == 130, rest
    assert "Traceback" not in rest
    teacher = (tmp_path / "demo" / "demo-teacher" / "model" / "model.safetensors").read_bytes()

    first = demo()
    rows = {line[:12].strip(): line for line in first.stdout.splitlines()}
    for name in ("teacher", "hard labels", "distilled", "+ hidden", "cut"):
        folder = tmp_path / "demo" / f"demo-{name.removeprefix('+ ').replace(' ', '-')}"
        record = read_json(folder / "run.json")
        assert (record["status"], record["steps"]) == ("done", 2)
        assert f"{record['held_out']['cross_entropy_nats']:.4f}" in rows[name]
        assert f"{record['student']['num_parameters']:,}" in rows[name]
        if name != "teacher":
            assert f"{record['held_out']['forward_kl_nats']:.4f}" in rows[name]
        assert (folder / "model" / "config.json").is_file()
    assert (tmp_path / "demo" / "demo-teacher" / "model" / "model.safetensors").read_bytes() == teacher

    report = tmp_path / "demo" / "report"
    assert first.stdout.endswith(f"\nreport    {report}/report.html\n")
    results = Results.model_validate(read_json(report / "results.json"))
    assert [(facts.name, facts.role) for facts in results.models][:3] == [
        ("teacher", "teacher"), ("baseline", "baseline"), ("distilled", "distilled"),
    ]  # fmt: skip
    for name, numbers in results.metrics.items():  # another length of rows, so not quite the number of its run
        run = read_json(Path(next(facts.model for facts in results.models if facts.name == name)).parent / "run.json")
        assert numbers["cross_entropy_nats"].value == pytest.approx(run["held_out"]["cross_entropy_nats"], abs=1e-4)
    (task,) = results.tasks
    assert (task.name, task.failed, len(task.scores)) == ("next_line", None, 5)

    second = demo()
    assert second.stdout == first.stdout
    assert second.stderr.count("is done already") == 6
