"""A short run of the campaign of damaged files: nothing wrong is accepted, and nothing ends in a traceback."""

import subprocess
import sys
from pathlib import Path

from stillroom.runs import read_json

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"


def test_one_damaged_file_of_each_kind(tmp_path, environment):
    words = [sys.executable, str(SCRIPT), "--cases", "1", "--seed", "0", "--json", str(tmp_path / "fuzz.json")]
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_json(tmp_path / "fuzz.json")
    assert found["faults"] == []
    assert len(found["counts"]) == 18
    assert all(sum(counts.values()) == 1 for counts in found["counts"].values())
