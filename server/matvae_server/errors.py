"""What a call can fail with. Each class knows its gRPC status; the message is public, details travel as google.rpc.

    ServiceError
    ├── InvalidArgumentError      INVALID_ARGUMENT, BadRequest names the field
    ├── NotFoundError             NOT_FOUND: no such model, head or decoder
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

import math
from typing import ClassVar

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2

from matvae.v1 import embedding_pb2 as pb


class ServiceError(Exception):
    """Root of what a call can fail with."""

    status: ClassVar[grpc.StatusCode]

    def details(self) -> list[Message]:
        """Messages of `google.rpc` that tell a program what the text tells a person."""
        return []

    def trailers(self) -> tuple[tuple[str, str], ...]:
        """Further trailing metadata."""
        return ()

    def to_proto(self) -> pb.CallError:
        """What a stream says of one of its requests."""
        return pb.CallError(code=self.status.value[0], message=str(self))


class InvalidArgumentError(ServiceError):
    """A field of the request cannot be served, now or later."""

    status = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description

    def details(self) -> list[Message]:
        """A BadRequest with the one violation."""
        violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=self.description)
        return [error_details_pb2.BadRequest(field_violations=[violation])]

    def to_proto(self) -> pb.CallError:
        """With the field."""
        return pb.CallError(code=self.status.value[0], message=self.description, field=self.field)


class NotFoundError(ServiceError):
    """No such model, no head for that prefix, or no decoder; the message lists what there is."""

    status = grpc.StatusCode.NOT_FOUND


class FailedPreconditionError(ServiceError):
    """The caller pinned a fingerprint that is not live, and the message lists the live one; or a gallery is broken."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class UnauthenticatedError(ServiceError):
    """The call bears no token that this server knows."""

    status = grpc.StatusCode.UNAUTHENTICATED


class ResourceExhaustedError(ServiceError):
    """There is too much to do. `retry_after` is in seconds."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, *, retry_after: float) -> None:
        self.retry_after_ms = max(1, math.ceil(1000 * retry_after))
        super().__init__(f"{message}; come back in {self.retry_after_ms} ms")

    def details(self) -> list[Message]:
        """A RetryInfo."""
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(self.retry_after_ms)
        return [error_details_pb2.RetryInfo(retry_delay=delay)]

    def trailers(self) -> tuple[tuple[str, str], ...]:
        """What gRPC's own retries obey (grpc/proposal A6)."""
        return (("grpc-retry-pushback-ms", str(self.retry_after_ms)),)

    def to_proto(self) -> pb.CallError:
        """With when to come back."""
        return pb.CallError(code=self.status.value[0], message=str(self), retry_after_ms=self.retry_after_ms)


class DeadlineExceededError(ServiceError):
    """The caller's deadline comes before the answer would."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED


class UnavailableError(ServiceError):
    """The server is draining; another one, or this one restarted, will answer."""

    status = grpc.StatusCode.UNAVAILABLE


class UnimplementedError(ServiceError):
    """The call needs something that is not installed on this server; every other call is answered."""

    status = grpc.StatusCode.UNIMPLEMENTED


class InternalError(ServiceError):
    """Something that is not the caller's fault."""

    status = grpc.StatusCode.INTERNAL

    @classmethod
    def of(cls, request_id: str) -> InternalError:
        """That of a call whose failure the log holds."""
        return cls(f"internal error; the server's log has it under the request id {request_id}")
