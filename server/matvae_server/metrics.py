"""What the server tells Prometheus: counted as calls end, served over HTTP; docs/observability.md lists every metric.

The labels of a metric take few values whatever callers send: methods of the service, models that were served, trained
prefixes ("other" stands for the rest), precisions, status codes. In a server of one process a scrape reads its numbers.
With workers each writes its own into a directory that the parent reads (prometheus_client's multiprocess mode).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import prometheus_client as prometheus
from prometheus_client import multiprocess
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from matvae.v1 import embedding_pb2 as pb
from matvae_server.admission import Admission
from matvae_server.call import Call
from matvae_server.config import ServerConfig, bracketed
from matvae_server.models import Model

OTHER = "other"
"""Stands for every value of a label that is not worth a time series of its own."""

_METHODS = frozenset(pb.DESCRIPTOR.services_by_name["EmbeddingService"].methods_by_name)
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"  # read by prometheus_client as it is imported
_PUBLISH_SECONDS = 1.0
SCRAPER_SECONDS = 10.0
"""How long who scrapes may keep a thread waiting for the next bytes."""
_QUEUE = "matvae_queue_images", "Images that are in the queue or being encoded."
_BOUND = "matvae_queue_bound_images", "Images that the queue holds; calls beyond it are refused."
_DECODING = "matvae_decode_queue_codes", "Codes that wait for the decoders or are being decoded."
_DECODING_BOUND = "matvae_decode_queue_bound_codes", "Codes that this queue holds; calls beyond it are refused."
_MODEL = "matvae_model", "The models that answer."


class MetricsError(RuntimeError):
    """The metrics cannot be served; the message says why and what to do."""


class Metrics:
    """The numbers of one process. Everything but `collect` runs on the event loop; none of it raises.

    `live` and `decoding`, which may be replaced, give the models that answer and the queue of what is to be decoded.
    `shared` is for a worker: what a scrape would ask it for (queues and models) it publishes by itself, see
    `keep_published`.
    """

    def __init__(self, *, shared: bool = False) -> None:
        # Else each has a second series, of when it began.
        prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.live: Callable[[], Sequence[Model]] = list
        self.decoding: Admission | None = None
        self.registry = registry = prometheus.CollectorRegistry()
        by_model = ("model",)
        self._requests = prometheus.Counter(
            "matvae_requests", "Calls that are over.", ("method", "code"), registry=registry
        )
        self._request_seconds = prometheus.Histogram(
            "matvae_request_seconds", "How long calls took.", ("method",), registry=registry, buckets=_SECONDS
        )
        self._messages = prometheus.Counter(
            "matvae_stream_messages", "Messages of streams that are over.", ("code",), registry=registry
        )
        self._sent = prometheus.Counter(
            "matvae_request_images", "Images, or codes to be decoded, of what is over.", ("method", "code"),
            registry=registry,
        )  # fmt: skip
        slices = ("model", "dimensions", "precision")
        self._images = prometheus.Counter(
            "matvae_images", "Images that were sent to be encoded.", (*slices, "outcome"), registry=registry
        )
        self._bytes = prometheus.Counter(
            "matvae_code_bytes", "Bytes of the codes that were sent.", slices, registry=registry
        )
        self._queue_seconds = prometheus.Histogram(
            "matvae_queue_seconds", "How long requests waited.", by_model, registry=registry, buckets=_SECONDS
        )
        self._batch_images = prometheus.Histogram(
            "matvae_batch_images", "Images in a batch.", by_model, registry=registry, buckets=_IMAGES
        )
        self._encode_seconds = prometheus.Histogram(
            "matvae_encode_seconds", "How long the encoder took for a batch.", by_model, registry=registry,
            buckets=_SECONDS,
        )  # fmt: skip
        self._published = _Published(registry) if shared else None
        if not shared:
            registry.register(_AtScrape(self))
            prometheus.ProcessCollector(registry=registry)
        # What `labels` returns, kept: looking it up costs more than counting.
        self._ended: dict[tuple[str, grpc.StatusCode], tuple[prometheus.Counter, prometheus.Histogram]] = {}
        self._answered: dict[grpc.StatusCode, prometheus.Counter] = {}
        self._sent_by: dict[tuple[str, grpc.StatusCode], prometheus.Counter] = {}
        self._sliced: dict[tuple[str, int, str], tuple[prometheus.Counter, ...]] = {}
        self._waited: dict[str, prometheus.Histogram] = {}
        self._batched: dict[str, tuple[prometheus.Histogram, prometheus.Histogram]] = {}

    def observe(self, call: Call, code: grpc.StatusCode) -> None:
        """A call is over."""
        try:
            count, seconds = self._ended[call.method, code]
        except KeyError:
            method = _method(call)
            count, seconds = self._requests.labels(method, code.name), self._request_seconds.labels(method)
            self._ended[call.method, code] = count, seconds
        count.inc()
        seconds.observe(call.total_seconds)
        if call.model and not call.parts:  # those of a stream were observed as they were answered
            self._observe_codes(call, code)

    def observe_part(self, part: Call, code: grpc.StatusCode) -> None:
        """A message of a stream is over."""
        try:
            count = self._answered[code]
        except KeyError:
            count = self._answered[code] = self._messages.labels(code.name)
        count.inc()
        if part.model:
            self._observe_codes(part, code)

    def _observe_codes(self, part: Call, code: grpc.StatusCode) -> None:
        """A request for codes, or to decode some, is over, be it a call or a message of a stream."""
        if sent := part.images or part.codes:
            try:
                count = self._sent_by[part.method, code]
            except KeyError:
                count = self._sent_by[part.method, code] = self._sent.labels(_method(part), code.name)
            count.inc(sent)
        key = part.model, part.dimensions, part.precision
        try:
            encoded, left_out, unanswered, codes = self._sliced[key]
        except KeyError:
            encoded, left_out, unanswered, codes = self._sliced[key] = self._of_slice(*key)
        if part.images:
            if code is grpc.StatusCode.OK:
                encoded.inc(part.images - part.failed_images)
                left_out.inc(part.failed_images)
            else:
                unanswered.inc(part.images)
        if part.bytes_out:
            codes.inc(part.bytes_out)
        if part.encode_seconds:
            try:
                waited = self._waited[part.model]
            except KeyError:
                waited = self._waited[part.model] = self._queue_seconds.labels(part.model)
            waited.observe(part.queue_seconds)

    def observe_batch(self, model: str, images: int, seconds: float) -> None:
        """A batch was encoded."""
        try:
            sizes, durations = self._batched[model]
        except KeyError:
            sizes, durations = self._batch_images.labels(model), self._encode_seconds.labels(model)
            self._batched[model] = sizes, durations
        sizes.observe(images)
        durations.observe(seconds)

    def publish(self) -> None:
        """Write what a scrape asks for to where the parent reads it; nothing in a server of one process."""
        if self._published:
            self._published.set(self.live(), self.decoding)

    async def keep_published(self) -> None:
        """Publish every second: a queue that stands still is to be seen, and then no call ends that could tell."""
        while self._published:
            self.publish()
            await asyncio.sleep(_PUBLISH_SECONDS)

    def _of_slice(self, model: str, dimensions: int, precision: str) -> tuple[prometheus.Counter, ...]:
        prefixes = {size for live in self.live() if live.bundle.card.name == model for size in _prefixes(live)}
        labels = model, str(dimensions) if dimensions in prefixes else OTHER, precision
        outcomes = ("encoded", "left_out", "unanswered")
        return (*(self._images.labels(*labels, outcome) for outcome in outcomes), self._bytes.labels(*labels))


class _AtScrape(Collector):
    """Queues and models of a server of one process, read when they are asked for, on the HTTP server's thread."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[GaugeMetricFamily | InfoMetricFamily]:
        """See prometheus_client."""
        live = self._metrics.live()
        queue = GaugeMetricFamily(*_QUEUE, labels=("model",))
        bound = GaugeMetricFamily(*_BOUND, labels=("model",))
        for name, (images, most) in _queues(live).items():
            queue.add_metric((name,), images)
            bound.add_metric((name,), most)
        info = InfoMetricFamily(*_MODEL, labels=("model", "fingerprint", "runtime"))
        for labels in _identities(live):
            info.add_metric(labels, {})
        yield from (queue, bound, info)
        if decoding := self._metrics.decoding:
            yield GaugeMetricFamily(*_DECODING, value=decoding.depth)
            yield GaugeMetricFamily(*_DECODING_BOUND, value=decoding.bound)


class _Published:
    """Queues and models of a worker. The parent adds up the queues of the workers that live."""

    def __init__(self, registry: prometheus.CollectorRegistry) -> None:
        self._queue = prometheus.Gauge(*_QUEUE, ("model",), registry=registry, multiprocess_mode="livesum")
        self._bound = prometheus.Gauge(*_BOUND, ("model",), registry=registry, multiprocess_mode="livesum")
        self._decoding = prometheus.Gauge(*_DECODING, registry=registry, multiprocess_mode="livesum")
        self._decoding_bound = prometheus.Gauge(*_DECODING_BOUND, registry=registry, multiprocess_mode="livesum")
        name, text = _MODEL
        labels = ("model", "fingerprint", "runtime")
        self._info = prometheus.Gauge(f"{name}_info", text, labels, registry=registry, multiprocess_mode="livemax")
        self._names: set[str] = set()
        self._seen: set[tuple[str, str, str]] = set()

    def set(self, live: Sequence[Model], decoding: Admission | None) -> None:
        queues, identities = _queues(live), _identities(live)
        self._names |= queues.keys()
        for name in self._names:  # what was published cannot be taken back, so what is gone becomes 0
            images, most = queues.get(name, (0, 0))
            self._queue.labels(name).set(images)
            self._bound.labels(name).set(most)
        if decoding:
            self._decoding.set(decoding.depth)
            self._decoding_bound.set(decoding.bound)
        self._seen |= identities
        for labels in self._seen:
            self._info.labels(*labels).set(labels in identities)


def _method(call: Call) -> str:
    return call.method if call.method in _METHODS else OTHER


def _prefixes(model: Model) -> tuple[int, ...]:
    return model.bundle.card.network.prefixes


def _queues(live: Sequence[Model]) -> dict[str, tuple[int, int]]:
    """Depth and bound by name; a model that retires counts to the one in whose name it still answers."""
    queues: dict[str, tuple[int, int]] = {}
    for model in live:
        images, most = queues.get(model.bundle.card.name, (0, 0))
        queues[model.bundle.card.name] = images + model.admission.depth, most + model.admission.bound
    return queues


def _identities(live: Sequence[Model]) -> set[tuple[str, str, str]]:
    return {(model.bundle.card.name, model.fingerprint, model.encoder.name) for model in live}


@contextlib.contextmanager
def endpoint(config: ServerConfig, registry: prometheus.CollectorRegistry) -> Iterator[str]:
    """While it lasts, the metrics are served on `metrics_port`; the URL. Raises MetricsError where it cannot be had."""
    try:
        server, thread = prometheus.start_http_server(config.metrics_port or 0, config.host, registry)
    except OSError as error:
        raise MetricsError(
            f"cannot serve metrics on {bracketed(config.host)}:{config.metrics_port}: {error.strerror}. "
            "Choose another port with --metrics-port (0: a free one) or --host"
        ) from None
    handler: Any = server.RequestHandlerClass

    def handle(self: Any) -> None:
        with contextlib.suppress(OSError):  # whose traceback would be on stderr
            handler.handle(self)

    server.RequestHandlerClass = type("Handler", (handler,), {"timeout": SCRAPER_SECONDS, "handle": handle})
    try:
        yield f"http://{bracketed(config.host)}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def of_workers(config: ServerConfig) -> Iterator[str | None]:
    """For the parent of workers: while it lasts, what those that it starts count is served in one place; the URL.

    None where the configuration has no `metrics_port`. Tell `worker_died` of every worker that ends. Raises
    MetricsError.
    """
    if config.metrics_port is None:
        yield None
        return
    registry = prometheus.CollectorRegistry()
    with tempfile.TemporaryDirectory(prefix="matvae-metrics-") as folder:
        multiprocess.MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
        os.environ[_DIRECTORY] = folder
        try:
            with endpoint(config, registry) as url:
                yield url
        finally:
            del os.environ[_DIRECTORY]


def worker_died(pid: int) -> None:
    """Its queue is gone; what it counted stays. Without `of_workers` there is nothing to do."""
    if folder := os.environ.get(_DIRECTORY):
        multiprocess.mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
