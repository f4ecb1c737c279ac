"""The live models: loaded, warmed up, found by name or fingerprint, and replaced while calls go on."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from matvae import __version__
from matvae.v1 import codec
from matvae.v1 import embedding_pb2 as pb
from matvae_server import bundle as bundles
from matvae_server import runtimes
from matvae_server.admission import Admission, BatchTime
from matvae_server.batcher import Batcher, EncoderLostError
from matvae_server.bundle import Bundle, BundleError
from matvae_server.config import ServerConfig
from matvae_server.decoder import Decoder
from matvae_server.errors import FailedPreconditionError, NotFoundError, Reason, ServiceError, named
from matvae_server.runtimes import Encoder

QUEUE_SECONDS = 0.025
"""How much work may wait where the configuration does not say: waiting longer helps nobody's throughput."""

OnBatch: TypeAlias = Callable[[str, int, float], None]
"""Told of every batch: the model's name, images, seconds."""

OnLost: TypeAlias = Callable[[EncoderLostError], None]
"""Told of an encoder that is lost."""

log = logging.getLogger("matvae.server")


class ModelError(RuntimeError):
    """A model cannot be served; the message says why and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A live model: its bundle, what computes its codes and in what order, what turns codes back into images, and what
    this server tells about it.
    """

    bundle: Bundle
    encoder: Encoder
    batcher: Batcher
    admission: Admission
    decoder: Decoder
    quantiser: Callable[[int, int], codec.Quantiser]
    """The ranges of z[offset:dimensions], kept once asked for."""
    description: pb.GetModelResponse

    @property
    def line(self) -> str:
        """What a person is told of it."""
        card = self.bundle.card
        dimensions = f"{card.network.dimensions} dimensions"
        return f"model {card.name}, {dimensions}, fingerprint {card.fingerprint[:12]}, on {self.encoder.name}"

    @property
    def fingerprint(self) -> str:
        """Of its embedding space."""
        return self.bundle.card.fingerprint


class Models:
    """The models of a server; the first bundle's is the default.

    Where a reload brings another fingerprint under a name, calls that name no fingerprint go to the new one at once,
    and those that pin the old one are answered by the old one for `drain_seconds` more. `on_lost`, which may be
    replaced, is told of an encoder that is lost.
    """

    def __init__(self, config: ServerConfig, on_batch: OnBatch = lambda *_: None) -> None:
        self._config = config
        self._on_batch = on_batch
        self.on_lost: OnLost = lambda _: None
        self._by_name: dict[str, Model] = {}
        self._retiring: dict[tuple[str, str], Model] = {}  # by name and fingerprint
        self._retirements: set[asyncio.Task[None]] = set()

    @property
    def default(self) -> Model:
        """That of the first bundle."""
        return next(iter(self._by_name.values()))

    def refusal(self) -> ServiceError | None:
        """Why no call for codes is let in, whatever it asks for: the queues of all models are full."""
        errors = [model.admission.refusal() for model in (*self._by_name.values(), *self._retiring.values())]
        return errors[0] if all(errors) else None

    def bound(self, name: str) -> int:
        """How many images the queue of that model holds; of one that is not there, the default's."""
        return self._by_name.get(name, self.default).admission.bound

    def live(self) -> list[Model]:
        """Every model that answers, those about to retire last; one for each name and fingerprint."""
        models: dict[tuple[str, str], Model] = {}
        for model in (*self._by_name.values(), *self._retiring.values()):
            models.setdefault((model.bundle.card.name, model.fingerprint), model)
        return list(models.values())

    def find(self, name: str, expected_fingerprint: str = "") -> Model:
        """The model of that name, the default where it is empty; where a fingerprint is expected, the one that has it.

        Raises NotFoundError for an unknown name and FailedPreconditionError for a fingerprint that is not live.
        """
        model = self._by_name.get(name) if name else self.default
        if model is None:
            raise NotFoundError(
                Reason.MODEL_NOT_FOUND, f"no model {named(name)} here; live: {', '.join(self._by_name)}"
            )
        if expected_fingerprint in ("", model.fingerprint):
            return model
        retiring = self._retiring.get((model.bundle.card.name, expected_fingerprint))
        if retiring:
            return retiring
        live = [other.fingerprint for other in self.live() if other.bundle.card.name == model.bundle.card.name]
        raise FailedPreconditionError(
            Reason.FINGERPRINT_MISMATCH,
            f"model {model.bundle.card.name!r} has fingerprint {' and, for a while, '.join(live)}, not the expected "
            f"{named(expected_fingerprint)}: codes of the two do not mix; fetch the model again and recompute what you "
            "store",
        )

    async def prepare(self) -> dict[str, Model]:
        """Load and warm up every bundle of the configuration; the models by name, for `replace`. Raises ModelError."""
        fresh: dict[str, Model] = {}
        try:
            for name in self._config.bundles:
                bundle, encoder = await asyncio.to_thread(_read, self._config, name)
                if bundle.card.name in fresh:
                    raise ModelError(f"two bundles are named {bundle.card.name!r}: a name must tell them apart")
                fresh[bundle.card.name] = await _warm(self._config, bundle, encoder, self._on_batch, self._lose)
        except BaseException:
            await discard(fresh)
            raise
        return fresh

    def replace(self, fresh: dict[str, Model]) -> None:
        """Put these models in place; those of before retire."""
        before, self._by_name = self._by_name, fresh
        for model in before.values():
            self._retire(model)

    async def close(self) -> None:
        """Finish what is queued and end the encoders' threads."""
        for task in self._retirements:
            task.cancel()
        await asyncio.gather(*(model.batcher.close() for model in self.live()))

    def _lose(self, error: EncoderLostError) -> None:
        self.on_lost(error)

    def _retire(self, model: Model) -> None:
        key = model.bundle.card.name, model.fingerprint
        self._retiring[key] = model
        log.info("model %s %s retires in %.0f s", model.bundle.card.name, model.fingerprint, self._config.drain_seconds)

        async def end() -> None:
            await asyncio.sleep(self._config.drain_seconds)
            if self._retiring.get(key) is model:
                del self._retiring[key]
            while model.admission.depth:  # what it still has to answer; nothing new comes
                await asyncio.sleep(0.1)
            await model.batcher.close()

        task = asyncio.create_task(end())
        self._retirements.add(task)
        task.add_done_callback(self._retirements.discard)


async def discard(models: dict[str, Model]) -> None:
    """End models that were prepared and are not wanted."""
    await asyncio.gather(*(model.batcher.close() for model in models.values()))


def _read(config: ServerConfig, name: str) -> tuple[Bundle, Encoder]:
    try:
        bundle = bundles.load(bundles.find(name))
        encoder = runtimes.choose(
            config.runtime,
            bundle,
            threads=config.encoder_threads,
            compute_precision=config.compute_precision,
            max_batch=config.max_batch,
        )
    except (BundleError, runtimes.RuntimeUnavailableError) as error:
        raise ModelError(str(error)) from None
    return bundle, encoder


async def _warm(config: ServerConfig, bundle: Bundle, encoder: Encoder, on_batch: OnBatch, on_lost: OnLost) -> Model:
    """The model, once it has encoded the smallest and the largest batch; what they took starts the predictions."""
    submit = encoder.submit if isinstance(encoder, runtimes.PipelinedEncoder) else None
    batcher = Batcher(encoder.encode, max_batch=config.max_batch, submit=submit)
    batcher.on_lost = on_lost
    sizes = (1, config.max_batch)
    try:
        for count in sizes:
            await _try_out(bundle, batcher, count)
        measured = [(count, await _try_out(bundle, batcher, count)) for count in sizes]
    except BaseException:
        await batcher.close()
        raise
    batch_time = BatchTime(measured)

    def note(images: int, seconds: float) -> None:
        batch_time.add(images, seconds)
        on_batch(bundle.card.name, images, seconds)

    batcher.on_batch = note
    admission = Admission(
        bound=_bound(config, batch_time),
        max_batch=config.max_batch,
        seconds=lambda waiting, images: batch_time.seconds(waiting + images, config.max_batch),
    )
    description = pb.GetModelResponse(
        card=bundle.card.to_proto(),
        limits=config.limits.to_proto(),
        runtime=encoder.name,
        compute_precision=encoder.compute_precision,
        server_version=__version__,
    )
    description.limits.max_queue_images = admission.bound
    description.limits.min_ping_interval_ms = config.min_ping_interval_ms
    return Model(
        bundle=bundle,
        encoder=encoder,
        batcher=batcher,
        admission=admission,
        decoder=Decoder(bundle),
        quantiser=functools.lru_cache(maxsize=256)(bundle.card.quantiser.slice),
        description=description,
    )


async def _try_out(bundle: Bundle, batcher: Batcher, count: int) -> float:
    """Encode black images; the seconds that took. Raises ModelError unless finite codes of the right shape came out."""
    network = bundle.card.network
    try:
        encoded = await batcher.encode(np.zeros((count, *network.image_shape), np.uint8))
    except Exception as error:  # whatever a runtime makes of a model that it could load
        raise ModelError(f"{bundle.path}: the encoder failed on {count} black images: {error}") from error
    codes = encoded.codes
    if codes.shape != (count, network.dimensions) or codes.dtype != np.float32 or not np.isfinite(codes).all():
        raise ModelError(
            f"{bundle.path}: the encoder gave {codes.dtype}{list(codes.shape)} for {count} black images, "
            f"not {count} finite float32 codes of {network.dimensions} dimensions"
        )
    return encoded.encode_seconds


def _bound(config: ServerConfig, batch_time: BatchTime) -> int:
    if config.max_queue:
        return config.max_queue
    rate = config.max_batch / max(1e-6, batch_time.seconds(config.max_batch, config.max_batch))
    # Of whole batches, so that full ones fill it to the brim: then more are refused before they are received.
    batches = math.ceil(QUEUE_SECONDS * rate / config.max_batch)
    return max(2 * config.limits.max_images_per_request, batches * config.max_batch)
