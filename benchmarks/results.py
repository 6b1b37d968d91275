"""Where a benchmark's result goes: a JSON file beside its script, with the machine that it was measured on."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any


def save(script: str | Path, result: dict[str, Any]) -> None:
    path = Path(script).with_suffix(".json")
    path.write_text(json.dumps({"date": datetime.now(UTC).date().isoformat(), **result}, indent=1) + "\n")
    print(f"written: {path.parent.name}/{path.name}")


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "num_cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
    }


def data_folder() -> Path:
    """The folder of real models and text: $STILLROOM_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("STILLROOM_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not there: set STILLROOM_DATA to the folder of real models and text")
    return folder
