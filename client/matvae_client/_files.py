"""One file at rest: safetensors whose metadata names its format and version. Nothing is pickled.

Writing goes to a file beside the target, which then replaces it: a reader sees the old file or the new one. Because
it replaces, it takes regular files only: a device or a pipe would be gone.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from matvae.tensors import map_tensors
from matvae_client._errors import FormatError

VERSION = 1

Tensors: TypeAlias = dict[str, npt.NDArray[Any]]
PathLike: TypeAlias = str | os.PathLike[str]


def write(path: PathLike, kind: str, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Write `tensors` as a file of format `kind`, atomically. Raises OSError, see `target_of`."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with replacing(path) as temporary:
        mode = temporary.stat().st_mode  # what the umask allows; safetensors would make it private
        contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        try:
            save_file(contiguous, temporary, {"format": kind, "version": str(VERSION), **metadata})
        except SafetensorError as error:  # a full disk, say: the number is all that it leaves of the OSError
            number = re.search(r"os error (\d+)", str(error))
            raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from None
        temporary.chmod(mode & 0o777)


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """An empty file beside `path`, to be filled in the block; it replaces `path` once it is on the disk.

    Raises OSError that names `path`, which then is as it was; see `target_of`.
    """
    target = target_of(path)
    temporary = target.with_name(f".matvae.{secrets.token_hex(8)}")  # as short for a name of any length
    try:
        with naming(path):
            temporary.touch(exist_ok=False)
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """Let an OSError of the block name the file `path`: the system's own names none once the file is open."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from None


def target_of(path: PathLike) -> Path:
    """The file that `write` makes or replaces: `path`, or what it links to.

    Raises OSError where something else than a regular file is there.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return target
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder: give the name of a file")
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is no regular file, and saving would replace it: give the name of a new file")
    return target


def read(path: PathLike, kind: str, *, without: str = "") -> tuple[Tensors, dict[str, str]]:
    """The tensors and metadata of a file of format `kind`, but for the tensor `without`, which may be large.

    Raises FormatError that names the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            found, version = metadata.get("format", "unknown"), metadata.get("version", "")
            if found != kind:
                raise FormatError(f"{path} is no {kind} file: its format is {found}")
            if version != str(VERSION):
                newer = version.isdecimal() and int(version) > VERSION
                raise FormatError(
                    f"{path} was written by a newer matvae (version {version} of {kind}, this one reads {VERSION}): "
                    "upgrade matvae"
                    if newer
                    else f"{path} has no known version of {kind}: {version!r}"
                )
            names = [name for name in file.keys() if name != without]  # noqa: SIM118
            try:
                return {name: file.get_tensor(name) for name in names}, metadata
            except (AttributeError, TypeError) as error:  # bfloat16, say, which numpy has not
                raise FormatError(f"{path} is damaged: it has a tensor of another type: {error}") from None
    except SafetensorError as error:
        raise FormatError(f"{path} is no {kind} file, or is damaged: {error}") from None
    except OSError as error:
        if Path(path).is_dir():  # of which safetensors says "No such device"
            raise FormatError(
                f"{path} is a folder, no {kind} file: a codes directory is what Codes.load reads"
            ) from None
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from None


def format_of(path: PathLike) -> str:
    """The format that the metadata of a file names; empty where it is no whole safetensors file. Raises OSError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return str((file.metadata() or {}).get("format", ""))
    except SafetensorError:
        return ""


def map_tensor(path: PathLike, name: str) -> npt.NDArray[np.uint8]:
    """A uint8 tensor of a file that `read` accepts, left on disk: pages come into memory as they are looked at.

    Read-only. The file may be replaced or unlinked meanwhile. Raises FormatError that names the file.
    """
    try:
        return map_tensors(Path(path), at_random=True)[0][name]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{path} is damaged: {name} cannot be mapped: {error}") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}") from None
