"""Runs that are killed, that a disk fails, or that lose power at a random write: whether they end in the same bytes.

python benchmarks/crash.py [--rounds 300] [--minutes M] [--add] [--seed 0] [--verb NAME …] [--kind NAME …] [--case N]

Each verb runs once undisturbed. Then, round after round, it runs in an empty folder until one of its operations on
files, drawn at random, which does one of three things:

    kill     ends the process by SIGKILL, a write after half of its bytes; of two processes it ends one
    errno    fails with ENOSPC, EDQUOT, EIO, EROFS, EACCES or EMFILE, alone or with all that come after it
    power    is the last before a power cut: all processes end, and what was not synced may be gone

Then the same command is run again (with --resume, where the verb has it) until it is done; one in three of these is
killed once more. A round passes where every byte of the product is that of the undisturbed run. Faults:

    other       it is done, and the product is another
    refused     the command that is run again ends with an error
    traceback   an error ends with a traceback, or in another exit code than 2
    hang        no end within 60 s

`crash_shim.c` is compiled by `cc` and preloaded: it stands before the C library, so that it also sees what compiled
code writes. (safetensors renames by a system call of its own, so here Python writes its bytes to the file.) After the
undisturbed run the files are rebuilt from what it recorded, and must be those that are there.

What a power cut leaves: of each file the bytes of its last fsync; of bytes that were not synced nothing, some, all, or
zeros in their place, file by file. Names (new, renamed, deleted) are kept in their order up to some moment between the
last fsync of a folder and the cut. So a file that was renamed and never synced is there and empty, as after a real cut
on ext4 or XFS, and a name is only sure once its folder was synced. One half of the cuts lose all that they can.

Each round follows from the seed, the verb, the kind and its number; --case makes one again. --add makes rounds
that come after those of crash.json, and adds their counts to it.
"""

import argparse
import ctypes
import errno
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from results import machine, save
from same_results import (
    ASK,
    HELD_OUT,
    TRAIN,
    TRAIN_TEXT,
    command,
    forked,
    import_everything,
    made,
    make_data,
    make_models,
    tidy,
    warm_up,
)

SECONDS = 60
LIBRARY = "STILLROOM_CRASH_SHIM"
OFF, LOG, KILL, FAIL, CUT = range(5)
KINDS = {"kill": KILL, "errno": FAIL, "power": CUT}
ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EMFILE)
FAULTS = ("other", "refused", "traceback", "hang")


# --- verbs -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Verb:
    words: tuple[str, ...]
    """The command. What it writes lies in ``case``."""
    again: tuple[str, ...] = ("--resume",)
    """What is added when it is run again."""
    ranks: int = 1
    before: tuple[str, ...] = ()
    """Folders that lie in ``case`` before it begins."""


CAPTURED = ("capture", *ASK, "shard_positions=300", "--quiet")
DISTILLED = (
    "distill", *TRAIN, HELD_OUT, "held_out.every=3", "steps=6", "checkpoints={every: 2, keep: 2}",
    "data.cache=case/cache", "out=case/run", "--quiet",
)  # fmt: skip
SIGNAL = "signal={kind: top_k, k: 8}"
VERBS = {
    "capture": Verb((*CAPTURED, SIGNAL, "hidden={layers: [1, final_norm]}", "out=case/run")),
    "distill": Verb(DISTILLED),
    "distill, 2 processes": Verb((*DISTILLED, "parallel.kind=fsdp", "steps=4"), ranks=2),
    "distill, keeping the best": Verb(
        (*DISTILLED, "checkpoints={every: 2, keep: 1, best: true}", "held_out.every=2", "export.dtype=float32")
    ),
    "prune": Verb(
        ("prune", "model=teacher", TRAIN_TEXT, "held_out.path=valid.jsonl", "device=cpu",
         "layers={kind: best, count: 2}", "width={hidden_size: 16, intermediate_size: 24}",
         "data.cache=case/cache", "out=case/run", "--quiet")
    ),
    "evaluate": Verb(
        ("evaluate", "models.a=teacher", "models.b=student", "tasks=[choices.yaml, written.yaml]", "device=cpu",
         "data={format: text, path: valid.jsonl, length: 32}", "out=case/run", "--quiet")
    ),
    "tokenize": Verb(
        ("distill", *TRAIN, "steps=1", "data.cache=case/cache", "out=run", "--quiet"), again=("--overwrite",)
    ),
    "store concat": Verb(("store", "concat", "top_k/store", "other/store", "out=case/run", "--quiet"), again=()),
    "store concat --overwrite": Verb(
        ("store", "concat", "top_k/store", "other/store", "out=case/run", "--overwrite", "--quiet"), (), 1, ("run",)
    ),
    "store join": Verb(("store", "join", "case/parts", "--quiet"), (), 1, ("parts",)),
    "store import": Verb(
        ("store", "import", "top_k.parquet", "out=case/run", "tokenizer=teacher", "--quiet"), again=()
    ),
    "store export": Verb(("store", "export", "top_k/store", "case/run.parquet", "--quiet"), again=()),
}  # fmt: skip
NO_PRODUCT = {"checkpoints", "report.md", "report.html"}
"""Names in a run's folder that are not its product: reports tell speeds and memory. Nor are hidden ones, which killed
runs leave."""


def make_inputs() -> None:
    make_models()
    make_data()
    for out, *words in (
        ("top_k", SIGNAL), ("other", SIGNAL, "data.path=valid.jsonl"), ("parts", SIGNAL, "part={index: 0, of: 2}"),
        ("parts", SIGNAL, "part={index: 1, of: 2}"),
    ):  # fmt: skip
        assert command((*CAPTURED, *words, f"out={out}"), {}) == 0
    assert command(("store", "export", "top_k/store", "top_k.parquet", "--quiet"), {}) == 0
    shutil.copytree("other/store", "run")


def product() -> dict[str, Any]:
    """What is in ``case``: the bytes of each file, and of JSON files what does not differ from run to run."""
    found: dict[str, Any] = {}
    for path in sorted(Path("case").rglob("*")):
        names = path.relative_to("case").parts
        if not path.is_file() or NO_PRODUCT & set(names) or any(name.startswith(".") for name in names):
            continue
        data = path.read_bytes()
        if path.name in ("run.json", "results.json") or (path.name == "manifest.json" and "cache" not in names):
            values = tidy(json.loads(data))
            found[str(path)] = {key: value for key, value in values.items() if key not in ("sha256", "restarts")}
        elif path.suffix == ".jsonl":
            found[str(path)] = [tidy(json.loads(line)) for line in data.splitlines()]
        else:
            found[str(path)] = hashlib.sha256(data).hexdigest()[:16]
    return found


# --- one run ---------------------------------------------------------------------------------------------------------
@dataclass
class Ended:
    codes: list[int]
    said: str
    operations: int
    hung: bool

    @property
    def cut_off(self) -> bool:
        """A process was killed, by a round that wanted it."""
        return -signal.SIGKILL in self.codes

    @property
    def fault(self) -> str | None:
        if self.hung:
            return "hang"
        wrong = "Traceback" in self.said or set(self.codes) - {0, 2, -signal.SIGKILL}
        return "traceback" if wrong and not self.cut_off else None


class Stage:
    """Runs commands in forked processes whose operations are counted, and of which one is disturbed."""

    def __init__(self, folder: Path) -> None:
        self.shim, self.log = ctypes.CDLL(os.environ[LIBRARY]), folder / "operations"
        self.page = mmap.mmap(-1, mmap.PAGESIZE)
        self.folder = folder / "work" / "case"

    def run(
        self, verb: Verb, words: tuple[str, ...], how: int, at: int = 0, number: int = 0, lasting: bool = False
    ) -> Ended:
        self.page[:16] = bytes(16)
        log = self.log.with_name("said")
        log.unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(verb.ranks)}
        descriptor = os.open(self.log, os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_WRONLY)

        def work(rank: int) -> int:
            from stillroom.distributed import failures

            failures.PATIENCE_S = 1.0
            address = ctypes.addressof(ctypes.c_char.from_buffer(self.page))
            self.shim.crash_start(
                bytes(self.folder), ctypes.c_void_p(address), how, ctypes.c_long(at), number, int(lasting), descriptor
            )
            here = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} if verb.ranks > 1 else {}
            return command(words, here)

        running = {forked(log, partial(work, rank)): rank for rank in range(verb.ranks)}
        os.close(descriptor)
        codes, until, hung = [0] * verb.ranks, time.monotonic() + SECONDS, False
        while running:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child:
                codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
            elif hung := time.monotonic() > until:
                how = CUT
            else:
                time.sleep(0.005)
            if how == CUT and (hung or -signal.SIGKILL in codes):  # the machine is off
                for other in running:
                    os.kill(other, signal.SIGKILL)
        said = log.read_text(errors="replace")
        return Ended(codes, said, int.from_bytes(self.page[:8], "little"), hung)


# --- a power cut -----------------------------------------------------------------------------------------------------
@dataclass
class File:
    now: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    loose: list[tuple[int, bytes] | int] = field(default_factory=list)
    """What was done since it was synced: bytes at an offset, or another length."""

    def do(self, step: tuple[int, bytes] | int) -> None:
        self.loose.append(step)
        apply(self.now, step)

    def sync(self) -> None:
        self.synced, self.loose = bytes(self.now), []

    def left(self, draw: random.Random, hard: bool) -> bytes:
        """The bytes after the cut."""
        way = 0 if hard or not self.loose else draw.randrange(4)
        if way == 0:
            return self.synced
        if way == 1:
            return bytes(self.now)
        data = bytearray(self.synced)
        for step in self.loose[: draw.randrange(len(self.loose)) + 1] if way == 2 else ():
            apply(data, step)
        return bytes(data) if way == 2 else bytes(data[: len(self.now)].ljust(len(self.now), b"\0"))


def apply(data: bytearray, step: tuple[int, bytes] | int) -> None:
    size = step if isinstance(step, int) else step[0] + len(step[1])
    data.extend(bytes(max(0, size - len(data))))
    if isinstance(step, int):
        del data[step:]
    else:
        data[step[0] : size] = step[1]


Tree = dict[str, File | None]
"""Files by their paths; None is a folder."""


def tree_of(folder: Path) -> Tree:
    """The files and folders in a folder, all of them on the disk."""
    found: Tree = {}
    for path in (folder, *folder.rglob("*")):
        data = path.read_bytes() if path.is_file() else None
        found[str(path)] = None if data is None else File(bytearray(data), data)
    return found


def operations(log: bytes) -> Iterator[tuple[str, str, str, int, bytes | int]]:
    """Yields (operation, path, other path, offset, bytes or length)."""
    place = 0
    while place < len(log):
        end = log.index(b"\0", place)
        op, offset, size, path, other = log[place:end].decode().split("\t")
        place, length = end + 1, int(size)
        data: bytes | int = length
        if op == "write":
            data, place = log[place : place + length], place + length
        yield op, os.path.normpath(path), other and os.path.normpath(other), int(offset), data


def replay(tree: Tree, log: bytes) -> list[Tree]:
    """Does the operations to a tree; returns the trees of names that a cut may leave, the least first."""
    names = [dict(tree)]
    for op, path, other, offset, data in operations(log):
        file = tree.get(path)
        if op == "write" and isinstance(file, File) and isinstance(data, bytes):
            file.do((offset, data))
        elif op == "truncate" and isinstance(file, File) and isinstance(data, int):
            file.do(data)
        elif op == "sync" and isinstance(file, File):
            file.sync()
        elif op == "sync":
            names = [dict(tree)]
        elif op in ("create", "mkdir", "remove", "rename", "exchange"):
            if op == "remove":
                tree.pop(path, None)
            elif op in ("create", "mkdir"):
                tree[path] = File() if op == "create" else None
            else:
                moved, back = taken(tree, path), taken(tree, other)
                tree.update({other + name: entry for name, entry in moved.items()})
                tree.update({path + name: entry for name, entry in back.items()} if op == "exchange" else {})
            names.append(dict(tree))
    return names


def taken(tree: Tree, path: str) -> Tree:
    """Takes what lies at a path and below it out of a tree."""
    inner = {name[len(path) :]: tree[name] for name in tree if name == path or name.startswith(f"{path}/")}
    for name in inner:
        del tree[path + name]
    return inner


def write_tree(tree: Tree, folder: Path, left: Callable[[File], bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, file in sorted(tree.items()):
        if file is None:
            Path(name).mkdir()
        else:
            Path(name).write_bytes(left(file))


def cut_power(before: Tree, log: bytes, folder: Path, draw: random.Random) -> None:
    """Leaves in the folder what a power cut after the operations of the log leaves."""
    names, hard = replay(before, log), draw.random() < 0.5
    write_tree(names[0] if hard else draw.choice(names), folder, lambda file: file.left(draw, hard))


# --- rounds ----------------------------------------------------------------------------------------------------------
class Campaign:
    def __init__(self, folder: Path) -> None:
        self.stage = Stage(folder)
        self.wanted: dict[str, dict[str, Any]] = {}
        self.kinds: dict[str, list[str]] = {}
        """The operations of each verb's undisturbed run, by their kind."""

    def prepare(self, verb: Verb) -> Tree:
        shutil.rmtree("run", ignore_errors=True)  # of tokenize
        shutil.rmtree("case", ignore_errors=True)
        Path("case").mkdir()
        for name in verb.before:
            shutil.copytree(Path("inputs", name), Path("case", name))
        return tree_of(self.stage.folder)

    def undisturbed(self, name: str) -> None:
        """Runs a verb, and checks that what was recorded of it rebuilds what it wrote.

        Raises:
            SystemExit: it failed, or the record does not.
        """
        verb = VERBS[name]
        tree = self.prepare(verb)
        ended = self.stage.run(verb, verb.words, LOG)
        if set(ended.codes) != {0}:
            raise SystemExit(f"{name}: {ended.codes}\n{ended.said}")
        log = self.stage.log.read_bytes()
        replay(tree, log)
        there = {path: file and bytes(file.now) for path, file in tree_of(self.stage.folder).items()}
        rebuilt = {path: file and bytes(file.now) for path, file in tree.items()}
        if there != rebuilt:
            other = [path for path in {**there, **rebuilt} if there.get(path, 0) != rebuilt.get(path, 0)]
            raise SystemExit(f"{name}: the record does not see all that is written: {', '.join(other[:5])}")
        self.kinds[name], self.wanted[name] = [op for op, *_ in operations(log)], product()

    def round(self, name: str, kind: str, number: int, seed: int) -> tuple[str, str]:
        """One round: "same" or the kind of fault, and what was said."""
        verb, draw = VERBS[name], random.Random(f"{seed} {name} {kind} {number}")
        before, kinds = self.prepare(verb), self.kinds[name]
        rare = [i for i, op in enumerate(kinds, 1) if op not in ("write", "create")]
        at = draw.choice(rare) if draw.random() < 0.5 else draw.randrange(len(kinds)) + 1
        failure, lasting = draw.choice(ERRNOS), draw.random() < 0.5
        ended = self.stage.run(verb, verb.words, KINDS[kind], at, failure, lasting)
        told = f"{kind} at operation {at} of {len(kinds)} ({kinds[at - 1]})"
        told += f", {errno.errorcode[failure]}{' from then on' * lasting}" if kind == "errno" else ""
        said = f"{told}\n{ended.codes} {ended.said}"
        if ended.fault:
            return ended.fault, said
        if kind == "power":
            cut_power(before, self.stage.log.read_bytes(), self.stage.folder, draw)
        for attempt in range(4):
            again = KILL if attempt == 0 and draw.random() < 1 / 3 else OFF
            ended = self.stage.run(verb, (*verb.words, *verb.again), again, draw.randrange(len(kinds)) + 1)
            said += f"\nagain{', killed' * ended.cut_off}: {ended.codes} {ended.said}"
            if ended.fault:
                return ended.fault, said
            if not ended.cut_off:
                break
        if set(ended.codes) != {0} and not (not verb.again and "exists" in ended.said):  # it was done before the crash
            return "refused", said
        found, wanted = product(), self.wanted[name]
        other = [path for path in {**found, **wanted} if found.get(path) != wanted.get(path)]
        for path in other[:3]:
            said += f"\n{path}: {found.get(path, 'missing')!s:.600}\nwanted: {wanted.get(path, 'missing')!s:.600}"
        return ("other" if other else "same"), said


def write_safetensors_here() -> None:
    import safetensors.torch as module

    def serialize_file(tensors: Any, path: Any, metadata: Any = None) -> None:
        Path(path).write_bytes(module.serialize(tensors, metadata))

    module.serialize_file = serialize_file


def preloaded(folder: Path) -> None:
    """Starts this program again, with the shim before the C library."""
    library = folder / "crash_shim.so"
    source = Path(__file__).with_name("crash_shim.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    os.environ.update({LIBRARY: str(library), "LD_PRELOAD": str(library)})
    os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=1e9, help="end after so many, whatever is left")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verb", nargs="+", default=list(VERBS), choices=list(VERBS))
    parser.add_argument("--kind", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--case", type=int, help="this round of the verb and the kind alone, and what was said")
    parser.add_argument("--add", action="store_true", help="go on after the rounds of crash.json")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where the result goes")
    options = parser.parse_args()
    options.json = options.json.resolve()
    if LIBRARY not in os.environ:
        preloaded(Path(tempfile.mkdtemp()).resolve())
    folder, source = Path(os.environ[LIBRARY]).parent, Path(__file__).resolve().parents[1] / "src"
    os.environ.pop("LD_PRELOAD")
    os.environ.update(
        HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1",
        STILLROOM_CACHE=f"{folder}/cache", NUMBA_CACHE_DIR=f"{folder}/numba",
    )  # fmt: skip
    (folder / "work").mkdir()
    told = json.loads(options.json.read_text()) if options.add else {}
    first, faults, options.seed = told.get("rounds", 0), told.get("faults", []), told.get("seed", options.seed)
    counts = {
        name: {kind: Counter[str](told.get("counts", {}).get(name, {}).get(kind, {})) for kind in options.kind}
        for name in options.verb
    }
    start = time.monotonic()
    try:
        os.chdir(folder / "work")
        import_everything(source)
        write_safetensors_here()
        made(make_inputs)
        Path("inputs").mkdir()
        for name in ("parts", "run"):
            shutil.move(name, "inputs")
        warm_up()
        campaign = Campaign(folder)
        for name in options.verb:
            campaign.undisturbed(name)
            number = len(campaign.kinds[name])
            print(f"{time.monotonic() - start:5.0f} s  {name}: {number} operations on files", flush=True)
        if options.case is not None:
            print(*campaign.round(options.verb[0], options.kind[0], options.case, options.seed))
            return 0
        cases = [(name, kind) for kind in options.kind for name in options.verb]
        rounds, last = first, first + options.rounds
        while rounds < last and time.monotonic() < start + 60 * options.minutes:
            (name, kind), case = cases[rounds % len(cases)], rounds // len(cases)
            rounds += 1
            found, said = campaign.round(name, kind, case, options.seed)
            counts[name][kind][found] += 1
            if found in FAULTS:
                faults.append({"verb": name, "kind": kind, "case": case, "fault": found, "said": said[-600:]})
                print(f"{name}, {kind}, case {case}: {found}: {said}\n", flush=True)
    finally:
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{'':28}{''.join(f'{kind:>12}' for kind in options.kind)}")
    for name, of_kind in counts.items():
        print(f"{name:28}" + "".join(f"{found['same']:5} of {found.total():3}" for found in of_kind.values()))
    same = sum(found["same"] for of_kind in counts.values() for found in of_kind.values())
    print(f"{same} of {rounds} rounds end in the same bytes, {time.monotonic() - start:.0f} s")
    save(options.json, {"machine": machine(), "seed": options.seed, "rounds": rounds, "same": same, "counts": counts,
                    "faults": faults})  # fmt: skip
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
