"""Files that were damaged, cut off, or made to harm: whether anything wrong is accepted, or ends in a traceback.

python benchmarks/fuzz.py [--minutes 10] [--seed 0] [--only NAME …] [--cases N] [--json FILE]

A run, a store and models are made once. Then one file of a copy is changed, by a flipped byte, a cut, a piece that is
lost or doubled, or in JSON by another value, and a command that reads it runs in a process of its own. What can come of
it:

    refused     an error of four parts, exit code 2
    same        accepted, with the result of the file as it was
    other       accepted, with another result: a fault where the project wrote the file itself and could have known
    traceback   exit code 1, or a signal: a fault
    hang        no end within 30 s: a fault
    memory      more than 1 GiB above what the file as it was takes: a fault

Each case follows from the seed and its number, so a fault can be made again with --only NAME --case NUMBER.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from results import machine, save
from same_results import (
    TRAIN,
    TRAIN_TEXT,
    command,
    forked,
    import_everything,
    make_data,
    make_models,
    model_facts,
    warm_up,
)

SECONDS = 30
MOST_BYTES = 2**30
FAULTS = ("other", "traceback", "hang", "memory")
Work = Callable[[], int | None]


@dataclass(frozen=True)
class Target:
    """A kind of file, the command that reads it, and what the command leaves."""

    files: tuple[str, ...]
    """Patterns of the files that are changed, in the folder of a case."""
    words: tuple[str, ...]
    """The command."""
    left: Callable[[], Any] = lambda: None
    """Gives the result of the command."""
    sealed: bool = False
    """The project wrote the file, so it can know of every change."""


def metrics() -> Any:
    """The losses and the exported weights of the run in the folder."""
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    return [[line.get("step"), line.get("loss_nats")] for line in lines], model_facts(Path("run/model"))


RUN = ("distill", *TRAIN, "steps=4", "checkpoints={every: 2, keep: 2}", "data.cache=cache", "out=run", "--quiet")
NEW = (*RUN, "out=new")
STORED = (*RUN, "teacher={kind: store, path: capture/store}", "data={format: store, length: 32}", "steps=2")
TARGETS = {
    "recipe": Target(("recipe.yaml",), ("distill", "recipe.yaml", "--dry-run")),
    "task": Target(("task.yaml",), ("evaluate", "models.teacher=teacher", "tasks=[task.yaml]", "out=e", "--quiet")),
    "rows.jsonl": Target(("train.jsonl",), (*NEW, "steps=1")),
    "rows.json": Target(("rows.json",), (*NEW, "steps=1", "data.path=rows.json")),
    "rows.parquet": Target(("rows.parquet",), (*NEW, "steps=1", "data.path=rows.parquet")),
    "config": Target(("student/config.json",), (*NEW, "steps=1")),
    "generation config": Target(("student/generation_config.json",), (*NEW, "steps=1")),
    "tokenizer": Target(("student/tokenizer*.json",), (*NEW, "steps=1")),
    "weights' header": Target(("student/model.safetensors",), (*NEW, "steps=1")),
    "plan": Target(("student/config.json", "student/model.safetensors"), ("plan", "verb=distill", *TRAIN, "out=new")),
    "state": Target(("run/checkpoints/step-*/state.json",), (*RUN, "--resume"), metrics, sealed=True),
    "checkpoint": Target(
        ("run/checkpoints/step-*/__*", "run/checkpoints/step-*/.metadata"), (*RUN, "--resume"), metrics, sealed=True
    ),
    "run.json": Target(("run/run.json",), (*RUN, "--resume"), metrics, sealed=True),
    "metrics": Target(("run/metrics.jsonl",), (*RUN, "--resume"), metrics, sealed=True),
    "tokenized": Target(("cache/**/*.*",), (*RUN, "--overwrite"), metrics, sealed=True),
    "store": Target(("capture/store/*.*",), (*STORED, "--overwrite"), metrics, sealed=True),
    "results": Target(("evaluation/results.json",), ("report", "evaluation"), sealed=False),
    "items": Target(("evaluation/items/*.jsonl",), ("report", "evaluation", "between=[a,b]"), sealed=False),
}


RECIPE = """verb: distill
student: {model: student}
teacher: {kind: model, model: teacher}
data: {format: text, path: train.jsonl, length: 32}
objectives:
  - {kind: forward_kl, weight: 0.5}
steps: 20
batch: {tokens: 128}
optimizer: {learning_rate: 1e-2, warmup: 0.2}
device: cpu
out: new
"""


# --- what is changed -------------------------------------------------------------------------------------------------
VALUES: list[Any] = [
    None, True, -1, 0, 1e308, 2**63, 10**30, "", "x" * 5000, [], {}, [[]], {"kind": "x"}, "\ud83d", "\x1b[2J",
    [1, "a", None], "../../../etc/passwd", -0.0,
]  # fmt: skip
TEXTS = [
    b"[" * 50_000,
    b"1" * 5000,
    b'"\\ud83d"',
    b"NaN",
    b"\xff\xfe",
    b"\x00",
    b"&a [*a]",
    b"!!python/object:os.system x",
]


def changed(data: bytes, path: Path, draw: random.Random) -> bytes:
    """The bytes of a file after one change."""
    if path.suffix == ".json" and draw.random() < 0.5:
        try:
            return json.dumps(with_another_value(json.loads(data), draw)).encode("utf-8", "surrogatepass")
        except ValueError:
            pass
    size = len(data)
    start = (
        draw.randrange(min(size, 400) if path.suffix == ".safetensors" and draw.random() < 0.8 else size) if size else 0
    )
    end = min(size, start + draw.choice((1, 2, 8, 64, 1000)))
    piece = data[start:end]
    match draw.randrange(6):
        case 0:
            return data[:start] + bytes(byte ^ 1 << draw.randrange(8) for byte in piece[:1]) + data[start + 1 :]
        case 1:
            return data[:start]
        case 2:
            return data[:start] + data[end:]
        case 3:
            return data[:start] + piece + data[start:]
        case 4:
            return data[:start] + draw.randbytes(len(piece)) + data[end:]
        case _:
            return data[:start] + draw.choice(TEXTS) + data[end:]


def with_another_value(tree: Any, draw: random.Random) -> Any:
    """JSON values of which one is another, is missing, or is there besides."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node if isinstance(node, dict) else range(len(node))) if isinstance(node, dict | list) else ():
            places.append((node, key))
            walk(node[key])

    walk(tree)
    if not places:
        return draw.choice(VALUES)
    node, key = draw.choice(places)
    match draw.randrange(5):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[str(draw.choice(VALUES))[:20]] = draw.choice(VALUES)
        case 2 if isinstance(node[key], int | float) and not isinstance(node[key], bool):
            node[key] += draw.choice((1, -1, 1000))
        case _:
            node[key] = draw.choice(VALUES)
    return tree


# --- a case ----------------------------------------------------------------------------------------------------------
def outcome(base: Path, target: Target, change: Callable[[Path], None]) -> tuple[str, Any, str, int]:
    """What comes of a command on a changed copy: the kind, its result, what was said, and its peak of memory."""
    with tempfile.TemporaryDirectory() as place:
        here = Path(place, "case")
        shutil.copytree(base, here, symlinks=True)
        os.chdir(here)
        try:
            change(here)
            log, found = here / "log", here / "left.json"

            def work() -> int:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                signal.alarm(SECONDS)
                code = command(target.words, {})
                if code == 0:
                    found.write_text(json.dumps(target.left(), sort_keys=True))
                return code

            _, status, usage = os.wait4(forked(log, work), 0)
            code, said = os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
            if code == -signal.SIGALRM:
                return "hang", None, said, usage.ru_maxrss * 1024
            left = json.loads(found.read_text()) if found.exists() else None
            kind = {0: "done", 2: "refused"}.get(code, "traceback")
            return "traceback" if "Traceback" in said else kind, left, said, usage.ru_maxrss * 1024
        finally:
            os.chdir(base)


def make_base(base: Path) -> None:
    """Models, data, a run that was stopped after its second step, a store, and an evaluation of two models."""
    import pyarrow.json
    import pyarrow.parquet

    os.chdir(base)
    make_models()
    make_data()
    rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    Path("rows.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "rows.parquet")
    Path("recipe.yaml").write_text(RECIPE)
    Path("task.yaml").write_text(Path("choices.yaml").read_text())
    ask = ("capture", "teacher.model=teacher", TRAIN_TEXT, "signal={kind: top_k, k: 8}", "out=capture", "--quiet")
    compare = ("evaluate", "models={a: teacher, b: student}", "tasks=[task.yaml]", "out=evaluation", "--quiet")
    for words in (ask, compare):
        must(partial(command, words, {}))
    must(stopped_run)


def stopped_run() -> int:
    from stillroom.cli.arguments import parse
    from stillroom.config import load
    from stillroom.distill.config import DistillConfig
    from stillroom.distill.run import run
    from stillroom.errors import Stopped

    def stop(event: str, values: Any) -> None:
        if event == "step" and values["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        run(load(DistillConfig, None, parse(RUN, ("distill",)).overrides), report=stop)
    except Stopped:
        return 0
    return 1


def must(work: Work) -> None:
    log = Path("log")
    if os.waitstatus_to_exitcode(os.waitpid(forked(log, work), 0)[1]):
        raise SystemExit(log.read_text())
    log.unlink()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--cases", type=int, help="so many of each kind of file, and no limit of time")
    parser.add_argument("--case", type=int, help="this one alone, and what it said")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where the result goes")
    options = parser.parse_args()
    options.json = options.json.resolve()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    base = Path(tempfile.mkdtemp()).resolve()
    counts = {name: Counter[str]() for name in options.only}
    faults: list[dict[str, Any]] = []
    try:
        import_everything(Path(__file__).resolve().parents[1] / "src")
        make_base(base)
        warm_up()
        before = {name: outcome(base, TARGETS[name], lambda _: None) for name in options.only}
        for name, (kind, _, said, _) in before.items():
            if kind != "done":
                raise SystemExit(f"{name}: the files as they are were {kind}\n{said}")
        end, number = time.monotonic() + 60 * options.minutes, 0
        while options.case is None and (number < options.cases if options.cases else time.monotonic() < end):
            for name in options.only:
                kind, said = one(base, name, options.seed, number, before[name])
                counts[name][kind] += 1
                if kind in FAULTS:
                    faults.append({"kind": name, "case": number, "fault": kind, "said": said[-300:]})
                    print(f"{name}, case {number}: {kind}: {' '.join(said.split())[-200:]}", flush=True)
            number += 1
        if options.case is not None:
            print(*one(base, options.only[0], options.seed, options.case, before[options.only[0]]))
            return 0
    finally:
        os.chdir("/")
        shutil.rmtree(base, ignore_errors=True)
    kinds = ("refused", "same", "accepted", *FAULTS)
    print(f"{'':18}{''.join(f'{kind:>11}' for kind in kinds)}")
    for name, found in counts.items():
        print(f"{name:18}{''.join(f'{found[kind]:11,}' for kind in kinds)}")
    save(options.json, {"machine": machine(), "seed": options.seed, "counts": counts, "faults": faults})
    return 1 if faults else 0


def one(base: Path, name: str, seed: int, number: int, before: tuple[str, Any, str, int]) -> tuple[str, str]:
    """The kind of one case's outcome, and what was said."""
    target, draw = TARGETS[name], random.Random(f"{seed} {name} {number}")

    def change(folder: Path) -> None:
        path = draw.choice(sorted(path for pattern in target.files for path in folder.glob(pattern) if path.is_file()))
        data = path.read_bytes()
        while (other := changed(data, path, draw)) == data:
            pass
        path.write_bytes(other)

    kind, left, said, peak = outcome(base, target, change)
    if kind in ("done", "refused") and peak > before[3] + MOST_BYTES:
        return "memory", said
    if kind == "done":
        same = left == json.loads(json.dumps(before[1]))
        kind = ("same" if same else "other") if target.sealed else "accepted"
    return kind, said


if __name__ == "__main__":
    sys.exit(main())
