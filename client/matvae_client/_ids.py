"""The ids of what an index holds, by position: the user's ints or strings, or running numbers, which take no memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from matvae_client import _files
from matvae_client._checks import no_text
from matvae_client._codes import Codes
from matvae_client._errors import InvalidRequestError
from matvae_client._names import name_tensors, names_of

Given: TypeAlias = Sequence[int] | Sequence[str] | npt.NDArray[Any]

MISSING = -1
"""The position of a neighbour that a search did not find."""


class Ids:
    """One id per position. Several positions may have the same id."""

    def __init__(self) -> None:
        self._ids: npt.NDArray[Any] | None = None  # int64, or objects (str); None while all are running numbers
        self._size = 0
        self._next = 0  # a running number is never given twice, whatever was removed

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, places: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """The ids at `places`; for MISSING it is -1, or None among strings."""
        if self._ids is None:
            return places
        found = self._ids[places]
        found[places == MISSING] = None if found.dtype == object else -1
        return found

    def checked(self, codes: Codes, given: Given | None) -> npt.NDArray[Any] | None:
        """The ids under which `codes` may be added, None for running numbers. Raises InvalidRequestError."""
        ids = codes.ids if given is None else given
        if ids is None:
            names = None
        else:
            listed = _listed(ids)
            if len(listed) != len(codes):
                raise InvalidRequestError.of("ids", f"{len(listed)} for {len(codes)} codes")
            try:
                names = np.array(listed, object if listed and isinstance(listed[0], str) else np.int64)
            except OverflowError:
                raise InvalidRequestError.of("ids", "an int must fit into 64 bits") from None
        if not len(codes):
            return None  # no ids have no type
        if self._size and (names is not None and names.dtype == object) != self._are_strings:
            raise InvalidRequestError.of("ids", "the index cannot mix ints and strings")
        return names

    def extend(self, names: npt.NDArray[Any] | None, count: int) -> None:
        """Append what `checked` returned for `count` codes."""
        if not count:
            return
        if names is not None or self._ids is not None:
            new = np.arange(self._next, self._next + count) if names is None else names
            self._ids = np.concatenate([self._all(), new]) if self._size else new
        self._size += count
        self._next += count

    def places(self, ids: Iterable[int] | Iterable[str]) -> npt.NDArray[np.int64]:
        """Every position of each of `ids`, ascending. Raises InvalidRequestError, naming those that are not there."""
        wanted = set(_listed(ids))
        held = self._all().tolist()
        unknown = wanted.difference(held)
        if unknown:
            some = ", ".join(sorted(map(repr, unknown))[:3]) + (", ..." if len(unknown) > 3 else "")
            raise InvalidRequestError.of("ids", f"{len(unknown)} of {len(wanted)} are not in the index: {some}")
        return np.array([place for place, name in enumerate(held) if name in wanted], np.int64)

    def remove(self, places: npt.NDArray[np.int64]) -> None:
        """Take these positions out; those after them move up."""
        self._ids = np.delete(self._all(), places)
        self._size = len(self._ids)

    def to_file(self) -> tuple[_files.Tensors, dict[str, str]]:
        """The tensors and metadata of a file."""
        metadata = {"count": str(self._size), "next_number": str(self._next)}
        if self._ids is None:
            return {}, metadata | {"ids": "running"}
        if self._are_strings:
            return name_tensors(self._ids.tolist()), metadata | {"ids": "strings"}
        return {"numbers": self._ids}, metadata | {"ids": "numbers"}

    @classmethod
    def from_file(cls, tensors: _files.Tensors, metadata: dict[str, str]) -> Self:
        """What `to_file` wrote. Raises KeyError or ValueError where it is damaged."""
        ids = cls()
        ids._size, ids._next = int(metadata["count"]), int(metadata["next_number"])
        if metadata["ids"] == "strings":
            ids._ids = np.array(names_of(tensors["ids"], tensors["id_sizes"]), object)
        elif metadata["ids"] == "numbers":
            ids._ids = tensors["numbers"]
        elif metadata["ids"] != "running":
            raise ValueError(f"ids of kind {metadata['ids']!r}")
        if ids._ids is not None and (ids._ids.shape != (ids._size,) or ids._ids.dtype not in (np.int64, object)):
            raise ValueError("it has not one id per code")
        return ids

    @property
    def _are_strings(self) -> bool:
        return self._ids is not None and self._ids.dtype == object

    def _all(self) -> npt.NDArray[Any]:
        return np.arange(self._size) if self._ids is None else self._ids


def _listed(ids: Iterable[int] | Iterable[str]) -> list[Any]:
    given: Any = ids.tolist() if isinstance(ids, np.ndarray) else ids  # an array without axes gives what it holds
    no_text("ids", given)
    if not isinstance(given, Iterable):
        raise InvalidRequestError.of("ids", f"{given!r} is one id: put it into a list")
    listed = list(given)
    for kind in (str, int | np.integer):
        if all(isinstance(name, kind) for name in listed):
            return listed
    raise InvalidRequestError.of("ids", "they are neither all ints nor all strings")
