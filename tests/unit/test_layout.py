"""What answers at once imports no torch: the floor, the command line, and every module of settings."""

import json
import subprocess
import sys
from pathlib import Path

import stillroom

ROOT = Path(stillroom.__file__).parent
FLOOR = ("errors", "config", "recipe", "schema", "layers", "terminal")


def test_the_floor_the_command_line_and_all_settings_import_no_torch():
    settings = sorted(path for path in ROOT.rglob("config.py") if path.parent != ROOT)
    files = [*(ROOT / f"{name}.py" for name in FLOOR), *sorted((ROOT / "cli").glob("*.py")), *settings]
    names = [".".join(("stillroom", *file.relative_to(ROOT).with_suffix("").parts)) for file in files]
    assert {"stillroom.cli.main", "stillroom.losses.config", "stillroom.training.config"} <= set(names)
    code = (
        "import importlib, json, sys\n"
        "found = {}\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    importlib.import_module(name.removesuffix('.__init__'))\n"
        "    for heavy in {'torch', 'transformers'} & set(sys.modules):\n"
        "        found.setdefault(heavy, name)\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(names)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}
