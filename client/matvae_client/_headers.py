"""How many pixels an image file has, from its first bytes: a server bounds the pixels of a request."""

from __future__ import annotations

_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the markers of a frame, which tell its size
_JPEG_ALONE = frozenset(range(0xD0, 0xD9)) | {0x01, 0xFF}  # markers without a length; 0xFF fills


def pixels(file: bytes) -> int:
    """Height x width of a PNG, JPEG or WebP file; 0 where it is none, which the server will say of that file alone."""
    if file.startswith(b"\x89PNG\r\n\x1a\n"):
        return _big(file, 16, 4) * _big(file, 20, 4)
    if file.startswith(b"\xff\xd8"):
        return _jpeg(file)
    if file[:4] == b"RIFF" and file[8:12] == b"WEBP":
        return _webp(file)
    return 0


def _jpeg(file: bytes) -> int:
    at = 2
    while at + 9 <= len(file) and file[at] == 0xFF:
        marker = file[at + 1]
        if marker in _JPEG_SIZES:
            return _big(file, at + 5, 2) * _big(file, at + 7, 2)
        at += (1 if marker == 0xFF else 2) if marker in _JPEG_ALONE else 2 + _big(file, at + 2, 2)
    return 0


def _webp(file: bytes) -> int:
    kind = file[12:16]
    if kind == b"VP8 ":
        return (_little(file, 26, 2) & 0x3FFF) * (_little(file, 28, 2) & 0x3FFF)
    if kind == b"VP8L":
        bits = _little(file, 21, 4)
        return ((bits & 0x3FFF) + 1) * ((bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8X":
        return (_little(file, 24, 3) + 1) * (_little(file, 27, 3) + 1)
    return 0


def _big(file: bytes, at: int, size: int) -> int:
    return int.from_bytes(file[at : at + size], "big")


def _little(file: bytes, at: int, size: int) -> int:
    return int.from_bytes(file[at : at + size], "little")
