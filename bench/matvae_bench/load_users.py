"""The users, for locust: each embeds the next images of the sample, and waits for its answer before it asks again.

Importing this imports locust, which patches the standard library for gevent.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import locust
import numpy as np
import numpy.typing as npt

from matvae_bench import kinds, payloads
from matvae_bench.images import LabelledImages
from matvae_bench.kinds import Kind
from matvae_client import Credentials, EmbeddingClient, MatvaeError

SERVER = "localhost:50051"


@functools.cache
def sample() -> LabelledImages:
    """The images that users send."""
    return LabelledImages.sample()


@functools.cache
def images(form: str) -> npt.NDArray[np.uint8] | list[bytes]:
    """All query images as they travel in that form, encoded once."""
    pixels = sample().query_images
    return pixels if form == "raw" else payloads.files(pixels, form)


def take(form: str, position: int, count: int) -> npt.NDArray[np.uint8] | list[bytes]:
    """`count` images from `position` on; after the last comes the first."""
    every = images(form)
    if isinstance(every, list):
        return [every[index % len(every)] for index in range(position, position + count)]
    return every.take(range(position, position + count), axis=0, mode="wrap")


class EmbeddingUser(locust.User):
    """Embeds `kind.batch` images, again and again. `--format`, where given, says how they travel."""

    abstract = True
    kind: Kind
    _made = 0

    def on_start(self) -> None:
        """Make a client of one's own; it connects with the first call."""
        options = self.environment.parsed_options
        self.kind = kinds.chosen(forms=getattr(options, "format", None) or ())[self.kind.name]
        self.client = EmbeddingClient(self.host or SERVER, credentials=Credentials.from_environment())
        EmbeddingUser._made += 1
        self.chance = Random(f"{getattr(self.environment.runner, 'worker_index', 0)}:{EmbeddingUser._made}")
        self.position = self.chance.randrange(len(sample().query_images))

    def on_stop(self) -> None:
        """Disconnect."""
        self.client.close()

    @locust.task
    def embed(self) -> None:
        """One request, reported to locust with its latency, its reply's bytes and its failure."""
        kind, position = self.kind, self.position
        wanted = take(kind.form, position, kind.batch)
        self.position = (position + kind.batch) % len(sample().query_images)
        codes, failure = None, None
        started = time.perf_counter()
        try:
            codes = self.client.embed(wanted, dimensions=kind.dimensions, precision=kind.precision)
        except MatvaeError as error:
            failure = error
        self.environment.events.request.fire(
            request_type="Embed",
            name=kind.title,
            response_time=(time.perf_counter() - started) * 1000,
            response_length=codes.nbytes if codes else 0,
            exception=failure,
            context={"kind": kind, "position": position, "codes": codes, "chance": self.chance},
        )


class Sensor(EmbeddingUser):
    """A sensor that can afford two bytes an image."""

    kind, weight = kinds.SENSOR, kinds.SENSOR.share


class Phone(EmbeddingUser):
    """A phone with a photograph and 32 bytes for its code."""

    kind, weight = kinds.PHONE, kinds.PHONE.share


class Desktop(EmbeddingUser):
    """A desktop that takes the whole code of a handful of files."""

    kind, weight = kinds.DESKTOP, kinds.DESKTOP.share


class Loader(EmbeddingUser):
    """A bulk loader that fills a binary index."""

    kind, weight = kinds.LOADER, kinds.LOADER.share


class Station(EmbeddingUser):
    """A workstation that takes the whole codes of 64 images at once, as h2load does in a cross-check."""

    kind, weight = kinds.STATION, kinds.STATION.share


USERS: tuple[type[EmbeddingUser], ...] = (Sensor, Phone, Desktop, Loader, Station)


def sharing(chosen: Mapping[str, Kind]) -> list[type[Any]]:
    """The classes of the kinds that have a share, with it as their weight."""
    for user in USERS:
        user.weight = chosen[user.kind.name].share
    return [user for user in USERS if user.weight]


def options_of(environment: Any) -> tuple[Sequence[kinds.Setting], Sequence[kinds.Setting]]:
    """What locust's options say of shares and formats."""
    options = environment.parsed_options
    return getattr(options, "share", None) or (), getattr(options, "format", None) or ()
