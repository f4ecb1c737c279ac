"""What a call can fail with. Each class knows its gRPC status; the message is public, details travel as google.rpc.

    ServiceError                  ErrorInfo gives the reason
    ├── InvalidArgumentError      INVALID_ARGUMENT, BadRequest names the field
    ├── NotFoundError             NOT_FOUND: no such model, head, decoder, gallery or id
    ├── FailedPreconditionError   FAILED_PRECONDITION: another fingerprint than the one expected, or a broken gallery
    ├── UnauthenticatedError      UNAUTHENTICATED: no token, or an unknown one
    ├── ResourceExhaustedError    RESOURCE_EXHAUSTED, RetryInfo says when to come back
    ├── DeadlineExceededError     DEADLINE_EXCEEDED: the answer would come too late, so nothing was computed
    ├── UnavailableError          UNAVAILABLE: the server is draining
    ├── UnimplementedError        UNIMPLEMENTED: the call needs something that is not installed here
    └── InternalError             INTERNAL: our fault; the log has the rest, under the id in the message

What must not reach a caller (paths, tracebacks) goes to the log, never into the message.
"""

from __future__ import annotations

import enum
import math
from typing import ClassVar

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from matvae.v1 import embedding_pb2 as pb

DOMAIN = "matvae"
"""Whose reasons these are, in `google.rpc.ErrorInfo`."""

LONGEST = 1000
"""Bytes of a message: beyond some 8 kB of metadata a caller would be told that something was exhausted."""
_LONGEST_NAME = 100


def brief(text: str) -> str:
    """A message as callers get it: its first LONGEST bytes."""
    data = text[: LONGEST + 1].encode()
    return text if len(data) <= LONGEST else data[:LONGEST].decode(errors="ignore") + "..."


def named(name: str) -> str:
    """A caller's own name for something, in quotes; of a long one the beginning: it may have 16 MiB."""
    return repr(name) if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]!r}..."


class Reason(enum.StrEnum):
    """What a program can tell apart, where a status means several things."""

    BAD_FIELD = "BAD_FIELD"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    HEAD_NOT_FOUND = "HEAD_NOT_FOUND"
    DECODER_NOT_FOUND = "DECODER_NOT_FOUND"
    GALLERY_NOT_FOUND = "GALLERY_NOT_FOUND"
    IDS_NOT_FOUND = "IDS_NOT_FOUND"
    FINGERPRINT_MISMATCH = "FINGERPRINT_MISMATCH"
    GALLERY_BROKEN = "GALLERY_BROKEN"
    TOKEN_REFUSED = "TOKEN_REFUSED"
    QUEUE_FULL = "QUEUE_FULL"
    TOO_LATE = "TOO_LATE"
    DRAINING = "DRAINING"
    NOT_INSTALLED = "NOT_INSTALLED"
    INTERNAL = "INTERNAL"


class ServiceError(Exception):
    """Root of what a call can fail with."""

    status: ClassVar[grpc.StatusCode]
    reason: Reason

    def details(self) -> list[Message]:
        """Messages of `google.rpc` that tell a program what the text tells a person."""
        return [error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN)]

    def trailers(self) -> tuple[tuple[str, str], ...]:
        """Further trailing metadata."""
        return ()

    def to_proto(self) -> pb.CallError:
        """What a stream says of one of its requests."""
        return pb.CallError(code=self.status.value[0], message=brief(str(self)), reason=self.reason)


class InvalidArgumentError(ServiceError):
    """A field of the request cannot be served, now or later."""

    status = grpc.StatusCode.INVALID_ARGUMENT
    reason = Reason.BAD_FIELD

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description

    def details(self) -> list[Message]:
        """With a BadRequest of the one violation."""
        violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=brief(self.description))
        return [error_details_pb2.BadRequest(field_violations=[violation]), *super().details()]

    def to_proto(self) -> pb.CallError:
        """With the field, which the message then need not name."""
        error = super().to_proto()
        error.message, error.field = brief(self.description), self.field
        return error


class NotFoundError(ServiceError):
    """No such model, head, decoder, gallery or id, as `reason` says; the message lists what there is."""

    status = grpc.StatusCode.NOT_FOUND

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class FailedPreconditionError(ServiceError):
    """The caller pinned a fingerprint that is not live, and the message lists the live one; or a gallery is broken."""

    status = grpc.StatusCode.FAILED_PRECONDITION

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class UnauthenticatedError(ServiceError):
    """The call bears no token that this server knows."""

    status = grpc.StatusCode.UNAUTHENTICATED
    reason = Reason.TOKEN_REFUSED


class ResourceExhaustedError(ServiceError):
    """There is too much to do. `retry_after` is in seconds."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = Reason.QUEUE_FULL

    def __init__(self, message: str, *, retry_after: float) -> None:
        self.retry_after_ms = max(1, math.ceil(1000 * retry_after))
        super().__init__(f"{message}; come back in {self.retry_after_ms} ms")

    def details(self) -> list[Message]:
        """With a RetryInfo."""
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(self.retry_after_ms)
        return [error_details_pb2.RetryInfo(retry_delay=delay), *super().details()]

    def trailers(self) -> tuple[tuple[str, str], ...]:
        """What gRPC's own retries obey (grpc/proposal A6)."""
        return (("grpc-retry-pushback-ms", str(self.retry_after_ms)),)

    def to_proto(self) -> pb.CallError:
        """With when to come back."""
        error = super().to_proto()
        error.retry_after_ms = self.retry_after_ms
        return error


class DeadlineExceededError(ServiceError):
    """The caller's deadline comes before the answer would."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = Reason.TOO_LATE


class UnavailableError(ServiceError):
    """The server is draining; another one, or this one restarted, will answer."""

    status = grpc.StatusCode.UNAVAILABLE
    reason = Reason.DRAINING


class UnimplementedError(ServiceError):
    """The call needs something that is not installed on this server; every other call is answered."""

    status = grpc.StatusCode.UNIMPLEMENTED
    reason = Reason.NOT_INSTALLED


class InternalError(ServiceError):
    """Something that is not the caller's fault."""

    status = grpc.StatusCode.INTERNAL
    reason = Reason.INTERNAL

    @classmethod
    def of(cls, request_id: str) -> InternalError:
        """That of a call whose failure the log holds."""
        return cls(f"internal error; the server's log has it under the request id {request_id}")
