"""One HTTP/2 connection that sends the same few gRPC requests again and again, and reads how each one ended.

grpc.aio needs about as much of a core for a call as the server that answers it, so with it nobody can offer three times
what a server can do, nor tell its latency from the client's own. Here a request is a few bytes prepared once; of the
replies only the status is read. It speaks what a gRPC server needs and nothing more: plaintext, prior knowledge, unary.
The server is told to keep no table of headers (RFC 7541, 4.2), so that every status stands in its frame as it is.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
from collections import deque

import grpc

from matvae_bench.errors import BenchmarkError
from matvae_bench.payloads import EMBED

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 0x1, 0x1, 0x4
_LARGEST = 2**31 - 1
_UNAVAILABLE: int = grpc.StatusCode.UNAVAILABLE.value[0]
_CANCELLED: int = grpc.StatusCode.CANCELLED.value[0]
_DEADLINE_EXCEEDED: int = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
_REFUSED_STREAM, _CANCEL = 7, 8
_STATUS = b"\x0bgrpc-status"


class WireConnection:
    """Requests by number: `send` one, `flush`, and `receive` the (number, status) of those that ended.

    When the connection breaks, or the server says that it goes, what it will not answer ends as UNAVAILABLE, and so
    does whatever is sent later.
    """

    def __init__(self, target: str, *, deadline: float) -> None:
        host, port = target.rsplit(":", 1)
        self.in_flight: dict[int, int] = {}  # stream to the caller's number
        self._headers = _frame(_HEADERS, _END_HEADERS, 0, _request_headers(target, deadline))
        self._next_stream = 1
        self._out = bytearray()
        self._in = bytearray()
        self._ended: list[tuple[int, int]] = []
        self._unsent: deque[tuple[int, memoryview]] = deque()  # streams whose data waits for a window
        self._blocked: dict[int, memoryview] = {}  # those that wait for their own window
        self._windows: dict[int, int] = {}  # of streams that have data left
        self._connection_window = self._stream_window = 65_535
        self._largest_frame, self._most_streams = 16_384, _LARGEST
        self._waiting: deque[tuple[int, bytes]] = deque()  # requests for which the server allows no stream yet
        self._consumed = 0
        self.broken = self._going = False
        try:
            self.socket = socket.create_connection((host.strip("[]"), int(port)), timeout=10)
        except OSError as error:
            raise BenchmarkError(f"no server answers at {target}: {error}") from None
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        settings = ((1, 0), (2, 0), (4, _LARGEST), (5, 2**24 - 1))  # no table, no push, windows, largest frame
        self._out += b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        self._out += _frame(_SETTINGS, 0, 0, b"".join(struct.pack(">HI", *setting) for setting in settings))
        self._out += _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _LARGEST - 65_535))

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def fileno(self) -> int:
        """For `select`."""
        return self.socket.fileno()

    @property
    def wants_to_write(self) -> bool:
        """Whether `flush` would find something to do once the socket takes more."""
        return bool(self._out)

    def send(self, number: int, message: bytes) -> None:
        """Begin a request; `message` is framed (see `framed`)."""
        if self.broken or self._going:
            self._ended.append((number, _UNAVAILABLE))
        elif len(self.in_flight) >= self._most_streams:
            self._waiting.append((number, message))
        else:
            self._begin(number, message)

    def cancel(self, number: int, stream: int) -> None:
        """Give a request up, as gRPC's clients do when its time is over."""
        del self.in_flight[stream]
        self._windows.pop(stream, None)
        self._blocked.pop(stream, None)
        self._out += _frame(_RST_STREAM, 0, stream, struct.pack(">I", _CANCEL))
        self._ended.append((number, _DEADLINE_EXCEEDED))

    def flush(self) -> None:
        """Hand the kernel what it takes now."""
        try:
            while self._out:
                sent = self.socket.send(self._out)
                del self._out[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._break()

    def receive(self) -> list[tuple[int, int]]:
        """The (number, status) of all that ended since the last call; reads what is there, without waiting."""
        if not self.broken:
            with contextlib.suppress(BlockingIOError):
                try:
                    chunk = self.socket.recv(2**20)
                except ConnectionError:
                    chunk = b""
                self._in += chunk
                self._parse()
                if not chunk:
                    self._break()
        ended, self._ended = self._ended, []
        return ended

    def _begin(self, number: int, message: bytes) -> None:
        stream = self._next_stream
        self._next_stream += 2
        self.in_flight[stream] = number
        self._out += self._headers[:5]
        self._out += stream.to_bytes(4, "big")
        self._out += self._headers[9:]
        self._windows[stream] = self._stream_window
        if self._unsent:  # those before it come first
            self._unsent.append((stream, memoryview(message)))
        elif rest := self._send_data(stream, memoryview(message)):
            self._unsent.append((stream, rest))

    def _send_data(self, stream: int, data: memoryview) -> memoryview | None:
        """Write as much as the windows let through; what is left over, unless the stream itself is blocked."""
        window = self._windows.get(stream)
        if window is None:
            return None  # it has ended
        while data:
            size = min(len(data), window, self._connection_window, self._largest_frame)
            if not size:
                break
            self._out += _frame(_DATA, _END_STREAM if size == len(data) else 0, stream, data[:size])
            data = data[size:]
            window -= size
            self._connection_window -= size
        if not data:
            del self._windows[stream]
            return None
        self._windows[stream] = window
        if window <= 0:
            self._blocked[stream] = data
            return None
        return data

    def _send_unsent(self) -> None:
        while self._unsent and self._connection_window > 0:
            stream, data = self._unsent.popleft()
            if rest := self._send_data(stream, data):
                self._unsent.appendleft((stream, rest))

    def _parse(self) -> None:
        buffer, position = self._in, 0
        while len(buffer) - position >= 9:
            size = int.from_bytes(buffer[position : position + 3], "big")
            if len(buffer) - position - 9 < size:
                break
            kind, flags = buffer[position + 3], buffer[position + 4]
            stream = int.from_bytes(buffer[position + 5 : position + 9], "big") & _LARGEST
            position += 9
            if kind == _DATA:
                self._consumed += size
            elif kind != _HEADERS or flags & _END_STREAM:  # the headers of a reply say nothing that matters here
                self._control(kind, flags, stream, bytes(buffer[position : position + size]))
            position += size
        del buffer[:position]
        if self._consumed > 2**29:
            self._out += _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", self._consumed))
            self._consumed = 0

    def _control(self, kind: int, flags: int, stream: int, content: bytes) -> None:
        if kind == _HEADERS:
            self._end(stream, _status(content))
        elif kind == _RST_STREAM:
            refused = int.from_bytes(content, "big") == _REFUSED_STREAM
            self._end(stream, _UNAVAILABLE if refused else _CANCELLED)
        elif kind == _SETTINGS and not flags & _ACK:
            for key, value in struct.iter_unpack(">HI", content):
                self._set(key, value)
            self._out += _frame(_SETTINGS, _ACK, 0, b"")
        elif kind == _PING and not flags & _ACK:
            self._out += _frame(_PING, _ACK, 0, content)
        elif kind == _WINDOW_UPDATE:
            self._widen(stream, int.from_bytes(content, "big"))
        elif kind == _GOAWAY:
            last = int.from_bytes(content[:4], "big") & _LARGEST
            for lost in [known for known in self.in_flight if known > last]:
                self._end(lost, _UNAVAILABLE)
            self._going = True
            self._ended += [(number, _UNAVAILABLE) for number, _ in self._waiting]
            self._waiting.clear()

    def _set(self, key: int, value: int) -> None:
        if key == 3:
            self._most_streams = value
        elif key == 4:
            for stream in self._windows:
                self._windows[stream] += value - self._stream_window
            self._stream_window = value
            for stream in list(self._blocked):
                self._widen(stream, 0)
        elif key == 5:
            self._largest_frame = value

    def _widen(self, stream: int, by: int) -> None:
        if not stream:
            self._connection_window += by
        elif stream in self._windows:
            self._windows[stream] += by
            if self._windows[stream] > 0 and stream in self._blocked:
                self._unsent.append((stream, self._blocked.pop(stream)))
        self._send_unsent()

    def _end(self, stream: int, status: int) -> None:
        number = self.in_flight.pop(stream, None)
        if number is not None:
            self._windows.pop(stream, None)
            self._blocked.pop(stream, None)
            self._ended.append((number, status))
        if self._waiting and len(self.in_flight) < self._most_streams:
            self._begin(*self._waiting.popleft())

    def _break(self) -> None:
        self.broken = True
        self._out.clear()
        lost = [*self.in_flight.values(), *(number for number, _ in self._waiting)]
        self._ended += [(number, _UNAVAILABLE) for number in lost]
        self.in_flight.clear()
        self._waiting.clear()


def framed(message: bytes) -> bytes:
    """A message with gRPC's prefix: not compressed, so many bytes."""
    return struct.pack(">BI", 0, len(message)) + message


def _frame(kind: int, flags: int, stream: int, content: bytes | memoryview) -> bytes:
    return b"".join((len(content).to_bytes(3, "big"), bytes((kind, flags)), stream.to_bytes(4, "big"), content))


def _request_headers(target: str, deadline: float) -> bytes:
    """HPACK without its table: indexed fields of the static one, and literals."""
    literal = (
        (b"\x04", EMBED),  # :path
        (b"\x01", target),  # :authority
        (b"\x0f\x10", "application/grpc"),  # content-type
        (b"\x00\x02te", "trailers"),
        (b"\x00\x0cgrpc-timeout", f"{math.ceil(1000 * deadline)}m"),
    )
    # 0x83 is :method POST, 0x86 is :scheme http.
    return b"\x83\x86" + b"".join(name + bytes((len(value),)) + value.encode() for name, value in literal)


def _status(block: bytes) -> int:
    start = block.find(_STATUS)
    if start < 0:
        raise BenchmarkError("cannot read the status of a reply: give --loader aio")
    start += len(_STATUS)
    return int(block[start + 1 : start + 1 + block[start]])
