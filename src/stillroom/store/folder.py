"""A store's folder that is made as a whole: it appears under its name when it is complete, and not before."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stillroom.errors import StorageError
from stillroom.files import writing
from stillroom.store.format import MANIFEST


def check_out(out: str | Path, *, overwrite: bool) -> None:
    """Returns where a new store may have this name.

    Raises:
        StorageError: something is there, and it is not a store or ``overwrite`` is off.
    """
    path = Path(out)
    if "://" in str(out):
        raise StorageError(
            f"a store cannot be written to {out}",
            {"out": out, "needed": "a folder of this machine"},
            why="A folder appears there at once and as a whole, by a new name; an address cannot do that.",
            fix="Write it here, and copy it.",
        )
    if not (path.exists() or path.is_symlink()):
        return
    store = path.is_dir() and not path.is_symlink() and (path / MANIFEST).is_file()
    if store and overwrite:
        return
    holds = ", ".join(sorted(p.name for p in path.iterdir())[:4]) or "nothing" if path.is_dir() else "a file"
    raise StorageError(
        f"{path} exists" if store or not overwrite else f"{path} is not a store",
        {"out": path, "holds": holds},
        why="Nothing that is there is lost unless you say so, and only a store is deleted at all.",
        fix="Choose another `out`." if not store else "Use --overwrite to delete that store, or choose another `out`.",
    )


@contextmanager
def new_store(out: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write a store into, which becomes ``out`` at the end, and is deleted where the block fails.

    With ``overwrite`` a store that is there is deleted, but only once the new one is whole.
    """
    check_out(out, overwrite=overwrite)
    path = Path(out)
    made, old = (path.with_name(f".{path.name}.{kind}") for kind in ("new", "old"))
    for rest in (made, old):
        if rest.exists():
            shutil.rmtree(rest)
    with writing(path):
        made.mkdir(parents=True)
    try:
        yield made
        with writing(path):
            if path.exists():
                path.rename(old)
            made.rename(path)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    if old.exists():
        shutil.rmtree(old)
