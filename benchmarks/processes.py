"""What a process of FSDP2 holds at most, and what a step sends: one and two processes (gloo, CPU), results in
processes.json. Bars: half of one process's weights, gradients and moments, and 15 %; FSDP2's messages and one sum."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "e2e")]

from conftest import build_model, build_tokenizer, texts  # noqa: E402

SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 24, "num_attention_heads": 4}
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def prepare(folder: Path) -> int:
    """A recipe, texts and two models; the number of parameters of the larger."""
    for name, shape in (("small", {}), ("big", SHAPE)):
        model = build_model("llama", seed=5, **shape)
        model.save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(40)))
    (folder / "r.yaml").write_text(
        f"student: {{model: {folder}/small}}\ndata: {{path: {folder}/text.jsonl, format: text, length: 32}}\n"
        "objectives: [{kind: cross_entropy}]\nsteps: 2\nbatch: {tokens: 64, micro_tokens: 32}\n"
        "optimizer: {learning_rate: 1e-3}\nprecision: float32\ndevice: cpu\n"
    )
    return sum(parameter.numel() for parameter in model.parameters())  # pyright: ignore


def watch(folder: Path, size: int) -> list[dict[str, Any]]:
    """What each of so many processes held and sent."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kind = "parallel.kind=fsdp" if size > 1 else "parallel.kind=none"
    words = [[kind, f"out={folder}/{size}-tiny"], [kind, f"student.model={folder}/big", f"out={folder}/{size}-big"]]
    begun, places = [], [folder / f"{size}-{rank}.json" for rank in range(size)]
    for rank, place in enumerate(places):
        context = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": str(port)}
        code = f"from watched_run import main; main({str(place)!r}, {str(folder / 'r.yaml')!r}, *{words!r})"
        env = {**os.environ, **GIVES_BACK, **context, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        env |= {"PYTHONPATH": os.pathsep.join(sys.path), "STILLROOM_CACHE": str(folder / "cache")}
        begun.append(subprocess.Popen([sys.executable, "-c", code], env=env))
    levels = [process.wait() for process in begun]
    assert not any(levels), levels
    return [json.loads(place.read_text()) for place in places]


def main() -> None:
    with TemporaryDirectory() as name:
        parameters = prepare(Path(name))
        told = {size: watch(Path(name), size) for size in (1, 2)}
    state = 16 * parameters
    found = {
        "parameters": parameters,
        "state_bytes": state,
        "most_bytes": {size: [rank["most"] for rank in ranks] for size, ranks in told.items()},
        "share": {size: max(r["most"]["step"] for r in ranks) / state for size, ranks in told.items()},
        "sent": told[2][0]["sent"][-1],
    }
    (Path(__file__).parent / "processes.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
