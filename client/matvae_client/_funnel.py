"""A funnel: few bytes of every vector in memory to make a shortlist, the whole code of what is on it to rank it.

After "Matryoshka Representation Learning" (Kusupati et al. 2022), where it is called adaptive and funnel retrieval.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Self

from matvae.tensors import loads
from matvae_client import _choice, _files, _stages
from matvae_client._checks import at_least_one, read_only
from matvae_client._choice import Choice
from matvae_client._codes import Codes, check_codes, from_tensors, require, to_tensors
from matvae_client._errors import FormatError, InvalidRequestError
from matvae_client._ids import Given, Ids
from matvae_client._index import Neighbours, PrefixIndex
from matvae_client._stages import Schedule

FORMAT = "matvae-funnel"


class FunnelIndex:
    """Searches full codes in stages: `schedule` is the (dimensions, keep) of each, the first over every vector.

    The first stage compares prefixes stored at `precision` (int8 by default; binary counts bits), each later one
    compares longer prefixes of what was kept, out of `codes`, which stay as they are. `FunnelIndex.load` leaves them on
    disk: then memory holds `schedule`'s first prefix alone.

        funnel = FunnelIndex(codes, [(16, 200), (128, 10)])
        funnel.save("photos.funnel")
        funnel = FunnelIndex.load("photos.funnel")   # 16 bytes a vector in memory
        distances, ids = funnel.search(query)

    The last stage's keep is the k that a search returns unless it is told another. Built once: to add or remove, build
    it anew, or use PrefixIndex. Raises InvalidRequestError for codes that are binary, empty or not from offset 0, and
    for a schedule that they cannot follow.
    """

    def __init__(
        self,
        codes: Codes,
        schedule: Sequence[tuple[int, int]] = ((16, 500), (128, 10)),
        *,
        precision: str = "int8",
        ids: Given | None = None,
    ) -> None:
        stages = tuple((int(dimensions), int(keep)) for dimensions, keep in schedule)
        self._set(codes, Schedule(stages=stages, precision=precision), None, ids)

    @classmethod
    def choose(
        cls,
        codes: Codes,
        *,
        recall: float = 0.99,
        k: int = 10,
        bytes_per_vector: int | None = None,
        ids: Given | None = None,
    ) -> Self:
        """The funnel that answers single queries fastest with that recall@k, of those within `bytes_per_vector`.

        Recall is against comparing every vector at full length, and measured on the gallery itself: 300 of its vectors
        ask for their own neighbours, themselves left out. A schedule is taken where the recall less two standard errors
        reaches the target; queries unlike the gallery may find less. `choice` and `str()` say what was measured. Where
        no schedule is faster than comparing every vector, they say so, `choice.pays` is False, and the index compares
        every vector; but where the full codes exceed `bytes_per_vector`, it stays within them, and is slower for it.

        Takes the memory of a flat index meanwhile, for 1,000,000 codes half a minute. Raises InvalidRequestError where
        no schedule reaches the recall within the bytes.
        """
        _check(codes)
        schedule, choice = _choice.choose(codes, recall=recall, k=k, bytes_per_vector=bytes_per_vector)
        funnel = cls.__new__(cls)
        funnel._set(codes, schedule, choice, ids)
        return funnel

    def _set(self, codes: Codes, schedule: Schedule, choice: Choice | None, ids: Given | None) -> None:
        _check(codes)
        if schedule.stages[-1][0] > codes.dimensions:
            raise InvalidRequestError.of(
                "schedule", f"{schedule.stages[-1][0]} dimensions, the codes have {codes.dimensions}"
            )
        self._ids = Ids()
        self._ids.extend(self._ids.checked(codes, ids), len(codes))
        self._schedule = schedule
        self._choice = choice
        self._codes = dataclasses.replace(codes, ids=None, errors=())
        self._shortlist = PrefixIndex(_stages.shorten(codes, schedule.first, schedule.precision))
        self._on_disk = ""

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        stages = list(self.schedule)
        return f"FunnelIndex({len(self)} codes like {self._codes[:0]!r}, {stages}, precision={self.precision!r})"

    def __str__(self) -> str:
        lines = [f"funnel over {len(self):,} codes, {self.nbytes:,} bytes in memory, {self.disk_bytes:,} on disk"]
        left = len(self)
        for number, (dimensions, keep) in enumerate(self.schedule):
            size = f", {self._schedule.bytes_per_vector} bytes a vector in memory"
            where = f", on disk in {self._on_disk}" if self._on_disk else ", in memory"
            kind = f"{self.precision}{size}" if number == 0 else f"{self._codes.precision}{where}"
            lines.append(f"  {number + 1}. {dimensions}-d {kind}: {left:,} -> {min(keep, left):,}")
            left = min(keep, left)
        return "\n".join(lines if self._choice is None else [*lines, f"  {self._choice}"])

    @property
    def schedule(self) -> tuple[tuple[int, int], ...]:
        """(dimensions, keep) of each stage."""
        return self._schedule.stages

    @property
    def precision(self) -> str:
        """Of the first stage; the others have that of the codes."""
        return self._schedule.precision

    @property
    def choice(self) -> Choice | None:
        """What was measured where the schedule was chosen."""
        return self._choice

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors in memory; ids of your own are not counted."""
        return self._shortlist.nbytes + (0 if self._on_disk else self._codes.nbytes)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the full codes left on disk; the operating system keeps in memory what it can of them."""
        return self._codes.nbytes if self._on_disk else 0

    def search(self, queries: Codes, k: int | None = None) -> Neighbours:
        """The `k` nearest of each query (by default the last stage's keep), by their squared distance in that stage.

        Queries have the codes' space and dimensions, at any precision but binary. A stage keeps at least k. Raises
        FingerprintMismatchError or InvalidRequestError where they do not fit.
        """
        k = self.schedule[-1][1] if k is None else at_least_one("k", k)
        require(queries, like=self._codes, what="this funnel", any_precision=True)
        distances, places = _stages.search(self._schedule, self._shortlist, self._codes, queries, k)
        return Neighbours(distances, self._ids[places])

    def save(self, path: _files.PathLike) -> None:
        """Write a funnel file, atomically: the full codes and, where there is one, the shortlist. Raises OSError."""
        ids, about_ids = self._ids.to_file()
        tensors, metadata = to_tensors(self._codes)
        if len(self.schedule) > 1:
            tensors["shortlist"] = _stages.shorten(self._codes, self._schedule.first, self.precision).rows
        metadata |= about_ids | {"schedule": json.dumps(self.schedule), "shortlist_precision": self.precision}
        if self._choice is not None:
            metadata["choice"] = json.dumps(dataclasses.asdict(self._choice))
        _files.write(path, FORMAT, tensors | ids, metadata)

    @classmethod
    def load(cls, path: _files.PathLike) -> Self:
        """Read a funnel file; the full codes stay on disk. (With one stage it is the shortlist that holds them all.)

        The file may be replaced or unlinked while it is in use. Raises FormatError that names the file.
        """
        tensors, metadata = _files.read(path, FORMAT, without="codes")
        short = tensors.pop("shortlist", None)
        nameless = {name: tensor for name, tensor in tensors.items() if name not in ("ids", "id_sizes")}
        codes = from_tensors(path, nameless | {"codes": _files.map_tensor(path, "codes")}, metadata)
        funnel = cls.__new__(cls)
        try:
            stages = tuple((int(dimensions), int(keep)) for dimensions, keep in loads(metadata["schedule"]))
            schedule = Schedule(stages=stages, precision=metadata["shortlist_precision"])
            choice = Choice(**loads(metadata["choice"])) if "choice" in metadata else None
            funnel._ids = Ids.from_file(tensors, metadata)
            if (
                len(funnel._ids) != len(codes)
                or stages[-1][0] > codes.dimensions
                or (len(stages) == 1) != (short is None)
            ):
                raise ValueError("its parts do not belong together")
            if short is None:
                shortlist = _stages.shorten(codes, schedule.first, schedule.precision)
            else:
                quantiser = codes.quantiser.slice(0, schedule.first)
                shortlist = dataclasses.replace(
                    codes,
                    rows=read_only(short),
                    dimensions=schedule.first,
                    precision=schedule.precision,
                    quantiser=quantiser,
                )
                if len(short) != len(codes):
                    raise ValueError("its shortlist is not of its codes")
        except KeyError as error:
            raise FormatError(f"{path} is damaged: it has no {error}") from None
        except (ValueError, TypeError, OverflowError) as error:
            raise FormatError(f"{path} is damaged: {error}") from None
        funnel._schedule, funnel._choice, funnel._codes = schedule, choice, codes
        funnel._shortlist = PrefixIndex(shortlist)
        funnel._on_disk = str(path)
        return funnel


def _check(codes: Codes) -> None:
    check_codes(codes)
    if codes.precision == "binary":
        raise InvalidRequestError.of(
            "codes", "binary codes have no more to rerank with: use PrefixIndex, or embed at a higher precision"
        )
    if codes.offset:
        raise InvalidRequestError.of("codes", f"they start at {codes.offset}: a funnel needs codes from offset 0")
    if not len(codes):
        raise InvalidRequestError.of("codes", "there are none")
