"""Taking turns with other processes and threads in a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def alone(folder: Path, name: str, waits: Callable[[], object] | None = None) -> Iterator[None]:
    """Hold the lock that is the file `name` in `folder`; wait while somebody else does, and call `waits` before that.

    Both are made where they are missing, and gone again where nothing but locks is in the folder then. The system lets
    go of the lock when its holder ends, however it ends. Raises OSError.
    """
    import fcntl  # not on every system that can read

    path = folder / name
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("w")
        except FileNotFoundError:  # whoever held the lock has just taken the empty folder away
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waits is not None:
                    waits()
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_still(path, file.fileno()):
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # somebody has just begun to use the folder, or deleted it
                    if all(entry.name.endswith(".lock") for entry in folder.iterdir()):
                        path.unlink()
                        folder.rmdir()
            return


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the locked file is the one that others find under its name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
