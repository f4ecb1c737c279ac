"""What a call can fail with. Each class knows its gRPC status; the message is public, details travel as google.rpc.

    ServiceError
    ├── InvalidArgumentError      INVALID_ARGUMENT, BadRequest names the field
    ├── NotFoundError             NOT_FOUND: no such model or head
    ├── FailedPreconditionError   FAILED_PRECONDITION: another fingerprint than the one expected
    ├── UnavailableError          UNAVAILABLE: the server is draining
    └── InternalError             INTERNAL: our fault; the log has the rest, under the id in the message

What must not reach a caller (paths, tracebacks) goes to the log, never into the message.
"""

from __future__ import annotations

from typing import ClassVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2


class ServiceError(Exception):
    """Root of what a call can fail with."""

    status: ClassVar[grpc.StatusCode]

    def details(self) -> list[Message]:
        """Messages of `google.rpc` that tell a program what the text tells a person."""
        return []


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


class NotFoundError(ServiceError):
    """No such model, or no head for that prefix; the message lists what there is."""

    status = grpc.StatusCode.NOT_FOUND


class FailedPreconditionError(ServiceError):
    """The caller pinned a fingerprint that is not live; the message lists the live one."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class UnavailableError(ServiceError):
    """The server is draining; another one, or this one restarted, will answer."""

    status = grpc.StatusCode.UNAVAILABLE


class InternalError(ServiceError):
    """Something that is not the caller's fault."""

    status = grpc.StatusCode.INTERNAL
