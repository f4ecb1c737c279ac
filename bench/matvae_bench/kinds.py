"""The kinds of users that load a server: what each asks for, how its images travel, and its share of all users.

No locust in here, which patches sockets and threads: the command line and the judge of the replies need kinds, too.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence

from matvae_bench.errors import BenchmarkError

FORMS = ("raw", "png", "jpeg")
"""How images travel: as pixels, or as files that the server decodes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """`share` of all users embed `batch` images a request, which travel as `form`."""

    name: str
    share: int
    dimensions: int
    precision: str
    batch: int
    form: str

    @property
    def title(self) -> str:
        """As results name it: `phone: 1 JPEG x 32-d int8`; raw images go without a word."""
        form = "" if self.form == "raw" else f" {self.form.upper()}"
        return f"{self.name}: {self.batch}{form} x {self.dimensions}-d {self.precision}"


SENSOR = Kind(name="sensor", share=3, dimensions=2, precision="int8", batch=1, form="raw")
PHONE = Kind(name="phone", share=3, dimensions=32, precision="int8", batch=1, form="jpeg")
DESKTOP = Kind(name="desktop", share=2, dimensions=128, precision="float32", batch=16, form="png")
LOADER = Kind(name="loader", share=1, dimensions=128, precision="binary", batch=128, form="raw")
STATION = Kind(name="station", share=0, dimensions=128, precision="float32", batch=64, form="raw")
"""What `matvae-bench cross-check` sends; it has no share unless one asks for it."""

KINDS = {kind.name: kind for kind in (SENSOR, PHONE, DESKTOP, LOADER, STATION)}

Setting = Sequence[str]
"""(kind, value) as they stand on a command line and travel to locust's workers; the kind is empty where it is all."""


def share(text: str) -> Setting:
    """The type of `--share`: KIND=SHARE."""
    name, _, value = text.partition("=")
    _known(name)
    if not value.isascii() or not value.isdigit():
        raise argparse.ArgumentTypeError(f"must be KIND=SHARE with a whole number as the share, not {text!r}")
    return name, value


def form(text: str) -> Setting:
    """The type of `--format`: KIND=FORMAT, or a format for all."""
    name, _, value = text.rpartition("=")
    if name or text.startswith("="):
        _known(name)
    if value not in FORMS:
        raise argparse.ArgumentTypeError(f"{value!r} is no format of images, there are {', '.join(FORMS)}")
    return name, value


def _known(name: str) -> None:
    if name not in KINDS:
        raise argparse.ArgumentTypeError(f"{name!r} is no kind of user, there are {', '.join(KINDS)}")


def chosen(shares: Iterable[Setting] = (), forms: Iterable[Setting] = ()) -> dict[str, Kind]:
    """All kinds by name, with these shares and formats; those not named keep their own.

    Raises BenchmarkError where nobody has a share.
    """
    kinds = dict(KINDS)
    for name, value in shares:
        kinds[name] = dataclasses.replace(kinds[name], share=int(value))
    for name, value in forms:
        for one in [name] if name else list(kinds):
            kinds[one] = dataclasses.replace(kinds[one], form=value)
    if not any(kind.share for kind in kinds.values()):
        raise BenchmarkError("no kind of user has a share: give one at least 1, as in --share phone=1")
    return kinds
