"""Run folders, files that are written whole or not at all, and interrupts that wait until the work is saved."""

import ctypes
import fcntl
import hashlib
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from stillroom.errors import ConfigError, DataError, Interrupted, StillroomError, Stopped, StorageError
from stillroom.recipe import differences, parse_json, plain
from stillroom.terminal import redact


def crc32(path: Path) -> int:
    """The CRC-32 of a file, which a flipped bit changes."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values with their checksum, the sha256 of them as JSON with sorted keys and no spaces."""
    others = {key: value for key, value in values.items() if key != "sha256"}
    text = json.dumps(others, sort_keys=True, separators=(",", ":"))
    return {**others, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def read_json(path: Path) -> Any:
    """Reads a JSON file of a run. One that is sealed is given without its checksum.

    Raises:
        DataError: it is not JSON, or was changed after it was sealed.
    """
    try:
        values = parse_json(path.read_bytes())
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON",
            {"problem": error},
            why="It says what the run is, so nothing can go on without it.",
            fix="Restore the file, or start again with --overwrite.",
        ) from None
    if not isinstance(values, dict) or "sha256" not in values:
        return values
    written, found = values.pop("sha256"), seal(values)["sha256"]
    if written != found:
        raise DataError(
            f"{path} was changed after it was written",
            {"sha256 in it": f"{written!s:.16}", "of what it says": found[:16]},
            why="A run that goes on from it would end with a result that nobody can explain.",
            fix="Restore the file, or start again with --overwrite.",
        )
    return values


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a disk says while ``path`` is written into a StorageError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StillroomError):
            raise
        folder = next((p for p in path.parents if p.is_dir()), Path())
        raise StorageError(
            f"{path} could not be written",
            {"reason": error.strerror or str(error), "free": f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB"},
            why="What was written before is whole.",
            fix="Make room or mend the rights, then run the same command with --resume.",
        ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, syncs it, renames it and syncs its name."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path), temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file as a whole.

    Args:
        values: JSON values, of :func:`seal` where :func:`read_json` is to tell whether they were changed.
    """
    write_whole(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def lock(path: Path, busy: OSError) -> IO[bytes]:
    """Locks a folder by its file ``.lock``, or a file, which is made and may be renamed or deleted while it is locked,
    until what is returned is closed or the process ends.

    Raises:
        OSError: ``busy``, where another process holds the lock, or has just held it and took the file away.
    """
    place = path / ".lock" if path.is_dir() else path
    file = place.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), place.stat()):
            raise FileNotFoundError
    except OSError:
        file.close()
        raise busy from None
    return file


def sync_folder(folder: Path) -> None:
    """Syncs the names in a folder, so that a file that was renamed into it is there after a power cut; or a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Syncs all files and folders in a folder, and itself last."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync_folder(path)
    sync_folder(folder)


EXCHANGE = 2
"""The flag of Linux's ``renameat2`` that lets two names change places."""


def replace_folder(temporary: Path, path: Path) -> None:
    """Gives a folder that is written its name, under which another one may be, which is then deleted. All that is in it
    is synced before it has the name, and the name before the other is deleted.

    Where the file system can exchange two names in one step (Linux's local ones), the old folder or the new one is
    under the name at every moment; after a kill the other may be left under the temporary name. Elsewhere the old one
    is moved aside first, to ``.NAME.old``, and moved back where the new one cannot take its place.
    """
    sync_tree(temporary)
    aside = path.with_name(f".{path.name}.old")
    if not path.exists():
        temporary.rename(path)
    elif _exchange(temporary, path):
        aside = temporary
    else:
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        try:
            temporary.rename(path)
        except BaseException:
            aside.rename(path)
            raise
    sync_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:  # kept: the one call of the C library, which tests replace
    """Lets two names of one folder change places in one step; False where the system cannot do so."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here = -100  # AT_FDCWD: paths are relative to the working folder
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), EXCHANGE) == 0


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a cluster's request, and a terminal that was closed."""


class StopRequests:
    """Tells, when it is called, whether there was a signal; ``number`` is which, or 0."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> bool:
        return self.number != 0


def ended(number: int, text: str) -> Interrupted:
    """What a verb raises that a signal ended, and whose work is saved. SIGTERM asks for an end in good order, as a
    cluster does that wants its machine back, and so does SIGHUP when a terminal is closed; Ctrl-C is a user's."""
    return Interrupted(text) if number == signal.SIGINT else Stopped(text)


@contextmanager
def deferred_interrupts(on_request: Callable[[], None] = lambda: None) -> Iterator[StopRequests]:
    """Inside, the first Ctrl-C, SIGTERM or SIGHUP is only remembered, and a second Ctrl-C acts at once. A second
    SIGTERM does nothing: clusters send several, and end what does not heed them in another way.

    Gives what tells whether there was one. Outside the main thread, where signals cannot be caught, they are
    left alone, and so is a signal that is ignored already, as SIGHUP is under ``nohup``.

    Args:
        on_request: is called when the first one comes.
    """
    requests = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def remember(number: int, _: object) -> None:
        requests.number = number
        restore()
        for again in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(again, signal.SIG_IGN)
        on_request()

    for number in before:
        signal.signal(number, remember)
    try:
        yield requests
    finally:
        restore()


class RunFolder:
    """The folder of one run, locked while it is open.

    Args:
        path: where; it must not exist, unless ``resume`` or ``overwrite`` is set.
        config: the resolved settings as plain values; on ``resume`` they must be those of the run that is there.
        free: settings that may differ from those of the run that is resumed.

    Raises:
        StorageError: the folder exists, or another process is at work in it.
        ConfigError: a resumed run has other settings; the message names them.
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        free: Collection[str] = (),
    ) -> None:
        self.path = Path(path)
        check_place(self.path, may_exist=resume or overwrite)
        self._made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        busy = StorageError(
            f"another run is at work in {self.path}",
            {"out": self.path},
            why="Two runs would write over each other's checkpoints.",
            fix="Wait for it or stop it; or choose another `out`.",
        )
        self._lock = lock(self.path, busy)
        try:
            self._enter(config, overwrite, free)
        except BaseException:
            self._lock.close()
            raise

    def _enter(self, config: Mapping[str, Any], overwrite: bool, free: Collection[str]) -> None:
        if overwrite:
            for entry in sorted(self.path.iterdir(), key=lambda p: p.name == "run.json"):  # the mark of a run goes last
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name != ".lock":
                    entry.unlink()
        record = self.path / "run.json"
        self.record: dict[str, Any] = _read_record(record) if record.exists() else {}
        self.resumed = bool(self.record)
        config = redact(plain(config))
        if self.resumed:
            changed = differences(self.record["config"], config)
            refused = {k: v for k, v in changed.items() if not any(k == f or k.startswith(f"{f}.") for f in free)}
            if refused:
                raise ConfigError(
                    f"the run in {self.path} has other settings",
                    {key: f"{old} there, {new} now" for key, (old, new) in refused.items()},
                    why="Going on with them would give a result that neither set of settings describes.",
                    fix="Resume with the settings of its run.json, or choose another `out`.",
                )
            self.record["config"] = config
            return
        self.record = {
            "status": "started",
            "config": config,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "git_commit": git_commit(),
            "machine": {"platform": platform.platform(), "num_cores": os.cpu_count()},
        }
        self.update()

    @property
    def done(self) -> bool:
        return self.record.get("status") == "done"

    def update(self, **values: Any) -> None:
        """Sets values of run.json and writes it; a reader sees the old file or the new one, never half of one."""
        self.record |= redact(values)
        self.record["peak_memory_bytes"] = max(peak_memory_bytes(), self.record.get("peak_memory_bytes", 0))
        write_json(self.path / "run.json", seal(plain(self.record)))

    def share(self, gather: Callable[[Any], list[Any]]) -> None:
        """Lets the other processes of the run know what run.json says, each of which calls this too."""
        gather(self.record)

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._made and isinstance(error, StillroomError) and _visible(self.path) == ["run.json"]:
            with suppress(OSError):  # nothing was made yet, so the mended command may have the same `out`
                shutil.rmtree(self.path)
        self.close()


class RunFolderView:
    """A run's folder as a process sees it that writes nothing there of its own: another one keeps run.json."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.record = Path(path), dict[str, Any]()

    @property
    def done(self) -> bool:
        return self.record.get("status") == "done"

    def share(self, gather: Callable[[Any], list[Any]]) -> None:
        """Takes over what run.json says, from the first process."""
        self.record = gather(None)[0]

    def update(self, **values: Any) -> None:
        self.record |= values

    def __enter__(self) -> "RunFolderView":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def check_place(place: str | Path, *, may_exist: bool) -> None:
    """Returns where a run may use the folder: it is not there, or it may be and is a run's.

    Raises:
        StorageError: something is there.
    """
    path = Path(place)
    way = next((p for p in (path, *path.parents) if p.exists()), path)
    if way.exists() and not way.is_dir():
        raise StorageError(
            f"the output folder {path} cannot be made",
            {"out": path, "in the way": f"the file {way}"},
            why="A run's output is a folder.",
            fix="Choose another `out`.",
        )
    if path.exists() and not may_exist:
        raise StorageError(
            f"the output folder {path} exists",
            {"out": path, "holds": _contents(path)},
            why="Nothing that an earlier run wrote is lost unless you say so.",
            fix="Use --resume to go on with that run, --overwrite to delete it first, or another `out`.",
        )
    if path.exists() and _visible(path) and not (path / "run.json").is_file():
        raise StorageError(
            f"{path} is not the folder of a run",
            {"expected": "run.json", "holds": _contents(path)},
            why="It may hold something else, which a run would mix with its own or --overwrite would delete.",
            fix="Choose another `out`, or empty the folder yourself.",
        )


def check_outside(out: str | Path, paths: Mapping[str, str | None]) -> None:
    """Returns where nothing that is read lies in the folder that is written, where --overwrite would delete it.

    Args:
        paths: what is read, by the name of its setting.

    Raises:
        ConfigError: something does.
    """
    folder = Path(out).resolve()
    for key, path in paths.items():
        if path is not None and Path(path).resolve().is_relative_to(folder):
            raise ConfigError(
                f"{key} lies inside the output folder",
                {key: path, "out": out},
                why="A run never reads what it writes, and --overwrite would delete it.",
                fix="Choose another `out`.",
            )


class Metrics:
    """metrics.jsonl: one object a line, written as it comes. Opening it drops what lies after step ``after``, or after
    what a checkpoint has sealed.

    A line that a killed run left half-written is dropped with it.

    Args:
        sealed: what `seal` gave when the state was saved that a run goes on from; None where nothing was.

    Raises:
        DataError: what was sealed was changed since, or a line is broken.
    """

    def __init__(self, path: Path, after: int, sealed: Mapping[str, int] | None = None) -> None:
        if sealed is not None:
            kept = path.read_bytes()[: sealed["size_bytes"]] if path.exists() else b""
        else:
            lines = [line for line in read_metrics(path) if line["step"] <= after] if path.exists() else []
            kept = "".join(json.dumps(line) + "\n" for line in lines).encode()
        self._path, self._sealed = path, {"size_bytes": len(kept), "crc32": zlib.crc32(kept)}
        if sealed is not None and self._sealed != sealed:
            form = "{size_bytes} bytes with the checksum {crc32:08x}".format_map
            raise DataError(
                f"{path} was changed after the checkpoint of step {after} was written",
                {"written until then": form(sealed), "there now": form(self._sealed)},
                why="Lines were changed, added or taken away, so what the run measured cannot be told from it.",
                fix="Restore the file, or start again with --overwrite.",
            )
        write_whole(path, kept)
        with writing(path):
            self._file = path.open("ab")

    def append(self, values: Mapping[str, Any]) -> None:
        line, (size, checksum) = (json.dumps(values) + "\n").encode(), self._sealed.values()
        with writing(self._path):
            self._file.write(line)
            self._file.flush()
        self._sealed = {"size_bytes": size + len(line), "crc32": zlib.crc32(line, checksum)}

    def seal(self) -> dict[str, int]:
        """Syncs what was written, and returns its size and checksum."""
        with writing(self._path):
            os.fsync(self._file.fileno())
        return self._sealed

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; a last line that was never finished is left out.

    Raises:
        DataError: another line is broken.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
        except ValueError:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DataError(
                f"{path} is damaged",
                {"line": number, "text": line[:60].decode(errors="replace").strip()},
                why="What a run measured cannot be told from what it did not.",
                fix="Mend or delete that line.",
            )
        rows.append(row)
    return rows


def _read_record(path: Path) -> dict[str, Any]:
    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise DataError(
            f"{path} does not describe a run",
            {"expected": "an object with `config`", "found": json.dumps(record)[:60]},
            why="Nobody can tell which settings the run had.",
            fix="Restore the file, or start again with --overwrite.",
        )
    return record


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in ("stillroom", "torch", "transformers", "tokenizers", "datasets", "peft", "numpy", "pyarrow"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_memory_bytes() -> int:
    """The most memory that this process has held at a time (resident, on the CPU)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _visible(path: Path) -> list[str]:
    """The names in a folder, without what a run that was killed at its very start leaves."""
    return sorted(p.name for p in path.iterdir() if p.name not in (".lock", ".run.json.tmp"))


def _contents(path: Path) -> str:
    return ", ".join(_visible(path)[:4]) or "nothing"


def git_commit() -> str | None:
    """The commit of the checkout that the working folder is in, if it is in one."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def same_model(one: object, other: object) -> bool:
    """Whether two fingerprints are of one model, as far as both tell: those of versions before tell samples alone."""
    if one == other or not (isinstance(one, str) and isinstance(other, str)):
        return one == other
    (sampled, _, all_bytes), (other_sampled, _, other_bytes) = one.partition(", "), other.partition(", ")
    if all_bytes.startswith("whole ") and other_bytes.startswith("whole "):
        return all_bytes == other_bytes
    return sampled == other_sampled
