"""Where each id of a gallery is, so that a pull of a few ids reads a few rows."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Sequence

import numpy as np

from matvae import store
from matvae.v1 import codec


class Places:
    """An index of the ids of some shards: 24 bytes an id, which as a dict would be ten times as many.

    It holds no file: each look is given the same shards again, mapped anew.
    """

    def __init__(self, parts: Sequence[store.Part]) -> None:
        self._starts = [part.starts() for part in parts]
        self._firsts = [0, *itertools.accumulate(map(len, parts))]  # by shard, the rows in those before it
        hashes = np.empty(self._firsts[-1], np.int64)
        for first, part in zip(self._firsts, parts, strict=False):
            hashes[first : first + len(part)] = np.fromiter(map(hash, part.ids()), np.int64, len(part))
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def rows(self, parts: Sequence[store.Part], names: Collection[str]) -> dict[str, codec.Bytes]:
        """The row of each of the names that is here."""
        wanted = np.fromiter(map(hash, names), np.int64, len(names))
        first, last = (np.searchsorted(self._hashes, wanted, side).tolist() for side in ("left", "right"))
        found: dict[str, codec.Bytes] = {}
        for name, start, stop in zip(names, first, last, strict=True):
            for row in self._order[start:stop].tolist():  # one, or those that have their hash in common
                shard = bisect.bisect_right(self._firsts, row) - 1
                place = row - self._firsts[shard]
                if parts[shard].name(self._starts[shard], place) == name:
                    found[name] = parts[shard].row(place)
        return found
