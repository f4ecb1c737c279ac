"""The log, on stderr: lines of text for a person, or of JSON for a collector; with --access-log a line for every call.

What a line says of a call is what `Call` knows of it: no metadata, so no token, and no bytes of images or codes.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Any

import grpc

from matvae_server.call import Call

FIELDS = (
    "request_id", "method", "code", "model", "messages", "images", "failed_images", "dimensions", "precision",
    "bytes_out", "queue_ms", "encode_ms", "total_ms",
)  # fmt: skip
"""What a line may say of a call, beside its message: `extra` of a log record."""

_SERVERS_FAULT = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)

log = logging.getLogger("matvae.access")


def configure(style: str) -> None:
    """Write every logger's lines, gRPC's and Python's warnings among them, as "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    handler.addFilter(_News())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)


class _News(logging.Filter):
    """Keeps back what gRPC says too often, and what no log may have.

    It logs a traceback for every caller who goes in the middle of a reply, which is nobody's fault. And, for every call
    whose metadata are not UTF-8, what stands there: a token, say, or kilobytes of a stranger's. That is said once.
    """

    _told = False

    def filter(self, record: logging.LogRecord) -> bool:
        """See logging.Filter."""
        if not record.name.startswith("grpc."):
            return True
        if "Invalid encoding" in str(record.msg):
            news, self._told = not self._told, True
            record.msg, record.args = (
                "a call came whose metadata are not UTF-8; there may be more, which are not said",
                (),
            )
            record.exc_info = record.exc_text = None
            return news
        return not (record.exc_info and record.exc_info[0] and record.exc_info[0].__name__ == "ExecuteBatchError")


def say_fatal(style: str, message: str) -> None:
    """Say why the server does not start: to whoever typed the command, or to what collects its log."""
    if style == "json":
        logging.getLogger("matvae.server").critical(message)
    else:
        print(f"matvae-serve: {message}", file=sys.stderr)


def access(call: Call, code: grpc.StatusCode) -> None:
    """A line for a call that is over."""
    level = logging.ERROR if code in _SERVERS_FAULT else logging.INFO
    if log.isEnabledFor(level):
        log.log(level, "call ended", extra=fields(call, code))


def fields(call: Call, code: grpc.StatusCode) -> dict[str, Any]:
    """What a line says of a call: `extra` for the log. Durations are in milliseconds."""
    known: dict[str, Any] = {"request_id": call.request_id, "method": call.method, "code": code.name}
    if call.model:
        known |= {
            "model": call.model,
            "images": call.images,
            "failed_images": call.failed_images,
            "dimensions": call.dimensions,
            "precision": call.precision,
            "bytes_out": call.bytes_out,
            "queue_ms": round(1000 * call.queue_seconds, 3),
            "encode_ms": round(1000 * call.encode_seconds, 3),
        }
    if call.parts:
        known["messages"] = call.parts
    return known | {"total_ms": round(1000 * call.total_seconds, 3)}


class TextFormatter(logging.Formatter):
    """Time, logger, level, message, then what is known of the call as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(name)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """See logging.Formatter."""
        return " ".join([super().formatMessage(record), *(f"{name}={value}" for name, value in _known(record).items())])


class JsonFormatter(logging.Formatter):
    """An object on one line: time (ISO 8601, UTC), level, logger, message, what is known of the call, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_known(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _known(record: logging.LogRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
