"""What can go wrong, as types. Each class that a server's status becomes knows that status as `code`.

    MatvaeError
    ├── InvalidRequestError       INVALID_ARGUMENT: a field is wrong, found by the server or here; also a ValueError
    ├── NotFoundError             NOT_FOUND: no such model, head or metric
    ├── FingerprintMismatchError  FAILED_PRECONDITION, except of a broken gallery: two embedding spaces would mix
    ├── OverloadedError           RESOURCE_EXHAUSTED: come back in `retry_after` seconds; CANCELLED by the server
    ├── DeadlineError             DEADLINE_EXCEEDED: no answer in time
    ├── UnavailableError          UNAVAILABLE: no server answers, or this client was closed
    ├── UnauthenticatedError      UNAUTHENTICATED: the server wants credentials
    ├── ServerError               INTERNAL and the rest: the server failed, or its reply cannot be used
    ├── BudgetError               no prefix and precision fits a budget; `nearest` is the plan that comes closest
    ├── MissingExtraError         an optional package is not installed; also an ImportError
    ├── ImageErrors               some images failed; `codes` holds the others
    └── FormatError               a file or card that this version cannot read

The message is for a person and says what to do; attributes are for programs.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, ClassVar

import grpc

if TYPE_CHECKING:
    from google.protobuf.any_pb2 import Any as AnyMessage

    from matvae_client._budget import Plan
    from matvae_client._codes import Codes


@dataclasses.dataclass(frozen=True)
class ItemError:
    """Why one image has no row: `index` is its position among the caller's images, `path` its path if it had one."""

    index: int
    code: grpc.StatusCode
    message: str
    path: str = ""

    def __str__(self) -> str:
        return f"images[{self.index}]{f' ({self.path})' if self.path else ''}: {self.message}"


class MatvaeError(Exception):
    """Root of everything that matvae_client raises on purpose."""

    code: ClassVar[grpc.StatusCode | None] = None


class InvalidRequestError(MatvaeError, ValueError):
    """An argument cannot be served, now or later; `fields` holds (field, description) pairs."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, message: str, fields: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.fields = fields

    @classmethod
    def of(cls, field: str, description: str) -> InvalidRequestError:
        """The error of one field."""
        return cls(f"{field}: {description}", ((field, description),))


class NotFoundError(MatvaeError):
    """The server has no such model or head, the card no such metric; the message lists what there is."""

    code = grpc.StatusCode.NOT_FOUND


class FingerprintMismatchError(MatvaeError):
    """Codes, an index, a head or a server are of another embedding space; the message names both fingerprints."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class OverloadedError(MatvaeError):
    """The server refuses or drops calls: it has too many, or is stopping. `retry_after`: seconds, None if not said."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(MatvaeError):
    """No answer within the deadline of the call, or a prediction of the server that there would be none."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class UnavailableError(MatvaeError):
    """No server answers at the address, or this client was closed."""

    code = grpc.StatusCode.UNAVAILABLE


class UnauthenticatedError(MatvaeError):
    """The server wants credentials that this client did not send."""

    code = grpc.StatusCode.UNAUTHENTICATED


class ServerError(MatvaeError):
    """The server failed, is no matvae server, or sent a reply that contradicts its request."""

    code = grpc.StatusCode.INTERNAL


class BudgetError(MatvaeError):
    """Nothing that the card measured fits the budget; `nearest` is the plan that comes closest."""

    def __init__(self, message: str, nearest: Plan) -> None:
        super().__init__(message, nearest)
        self.nearest = nearest

    def __str__(self) -> str:
        return str(self.args[0])


class MissingExtraError(MatvaeError, ImportError):
    """What was asked for needs an optional package; the message says what to install."""


class ImageErrors(MatvaeError):  # noqa: N818 - there are several
    """Some images of an `embed` failed. `codes` has a row for each of the others, in order; `errors` says why."""

    def __init__(self, message: str, codes: Codes, errors: tuple[ItemError, ...]) -> None:
        super().__init__(message, codes, errors)
        self.codes = codes
        self.errors = errors

    def __str__(self) -> str:
        return str(self.args[0])


class FormatError(MatvaeError):
    """A codes, index or classifier file, or a model card, is damaged, of another kind, or of a newer format."""


_STATUS_KEY = "grpc-status-details-bin"
"""Trailing metadata that a server writes, and gRPC itself does not."""

_CHANNEL_CLOSED = "Channel closed!"
"""What grpc says of a call that the closing of its own channel ends; whatever else is CANCELLED, the server cut off."""

_BY_STATUS: dict[grpc.StatusCode, type[MatvaeError]] = {
    error.code: error for error in (NotFoundError, FingerprintMismatchError) if error.code is not None
}


def from_rpc_error(error: grpc.RpcError, target: str, timeout: float, proxy: str = "") -> MatvaeError:
    """The error that a failed call to `target`, with a deadline of `timeout` seconds, becomes.

    `proxy` is the variable of the environment that sends the call through a proxy.
    """
    status, text = error.code(), error.details() or "no details"
    if status is grpc.StatusCode.INVALID_ARGUMENT:
        fields = _field_violations(error)
        return InvalidRequestError("; ".join(f"{name}: {what}" for name, what in fields) or text, fields)
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if "larger than max" in text:  # gRPC's own refusal of a message, which waiting does not cure
            return InvalidRequestError(f"a message is over the size limit of {target}: send smaller images ({text})")
        seconds = _retry_after(error)
        when = "later" if seconds is None else f"in {seconds:g} s"
        return OverloadedError(f"{target} is overloaded: try again {when} ({text})", seconds)
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        metadata: Any = error.trailing_metadata() or ()
        if _STATUS_KEY in dict(metadata):  # the server refused, in its words
            return DeadlineError(
                f"{target} could not answer within {timeout:g} s ({text}): a larger timeout= waits longer"
            )
        return DeadlineError(
            f"no answer from {target} within {timeout:g} s: is it overloaded? A larger timeout= waits longer"
        )
    if status is grpc.StatusCode.CANCELLED:
        if text == _CHANNEL_CLOSED:
            return UnavailableError(f"the call to {target} ended because this client was closed")
        return OverloadedError(
            f"{target} dropped the call: it is stopping, or has too many calls; try again later ({text})"
        )
    if status is grpc.StatusCode.UNAUTHENTICATED:
        return UnauthenticatedError(
            f"{target} wants a token that it knows: credentials=Credentials(token=...), or on the command line "
            f"--token-file or MATVAE_TOKEN ({text})"
        )
    if status is grpc.StatusCode.UNAVAILABLE:
        through = (
            f"; {proxy} may send this call through a proxy, and no_proxy names hosts that need none" if proxy else ""
        )
        if hint := _tls_hint(text):
            return UnavailableError(f"no connection to {target}: {hint} ({text}){through}")
        return UnavailableError(
            f"no server answers at {target}: start one with matvae-serve, or check the address ({text}){through}"
        )
    if status is grpc.StatusCode.UNIMPLEMENTED:
        return ServerError(f"{target} does not offer this call: is it a matvae server, and not an older one? ({text})")
    if status in _BY_STATUS and _reason(error) != "GALLERY_BROKEN":
        return _BY_STATUS[status](text)
    return ServerError(f"{target} failed: {text}{_named(error, text)}")


def _named(error: grpc.RpcError, text: str) -> str:
    """The name by which the server's log knows the call, unless `text` says it already."""
    trailers: Any = error.trailing_metadata() or ()
    request_id = dict(trailers).get("x-request-id")
    return f" (request id {request_id})" if request_id and request_id not in text else ""


_TLS_HINTS = (
    ("WRONG_VERSION_NUMBER", "it does not speak TLS: leave ca and tls (--ca, --tls) out, or check the port"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not of an authority in ca (--ca), or has expired"),
    ("Hostname Verification", "its certificate is of another name: server_name (MATVAE_SERVER_NAME) says which"),
    ("handshake failed", "the TLS handshake failed: check ca, cert and key (--ca, --cert, --key)"),
)
_CUT_OFF = re.compile("failed to connect.*(socket closed|reset by peer|broken pipe|end of tcp stream)", re.I | re.S)


def _tls_hint(text: str) -> str | None:
    """What TLS has to do with a connection that was not made; None where nothing points to it."""
    for mark, hint in _TLS_HINTS:
        if mark.lower() in text.lower():
            return hint
    if _CUT_OFF.search(text):
        return (
            "it hung up at once. If it wants TLS, give ca or tls=True (--ca, --tls); if it wants a certificate of "
            "yours, cert and key (--cert, --key)"
        )
    return None


def _details(error: grpc.RpcError) -> list[AnyMessage]:
    from grpc_status import rpc_status

    try:
        status = rpc_status.from_call(error)
    except ValueError:  # details that contradict the status are as good as none
        return []
    return list(status.details) if status else []


def _field_violations(error: grpc.RpcError) -> tuple[tuple[str, str], ...]:
    from google.rpc import error_details_pb2

    request = error_details_pb2.BadRequest()
    return tuple(
        (violation.field, violation.description)
        for detail in _details(error)
        if detail.Unpack(request)
        for violation in request.field_violations
    )


def _reason(error: grpc.RpcError) -> str:
    """What the server calls it, where its status means several things; empty where it says nothing."""
    from google.rpc import error_details_pb2

    info = error_details_pb2.ErrorInfo()
    return next((info.reason for detail in _details(error) if detail.Unpack(info)), "")


def _retry_after(error: grpc.RpcError) -> float | None:
    from google.rpc import error_details_pb2

    info = error_details_pb2.RetryInfo()
    for detail in _details(error):
        if detail.Unpack(info):
            return max(0.0, float(info.retry_delay.seconds + info.retry_delay.nanos / 1e9))
    return None
