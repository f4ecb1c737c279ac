"""Pixels are counted from a file's first bytes, and requests keep to the server's limit of them."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from matvae_client import EmbeddingClient
from matvae_client._headers import pixels

if TYPE_CHECKING:
    from conftest import FaultyServer


def _file(size: tuple[int, int], mode: str, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 7).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (300, 7), (1029, 517)])
@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("L", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("L", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True, "exif": b"Exif\0\0" + b"\xff\xc0" * 500, "comment": b"\xff\xd8\xff\xc0"}),
        ("RGB", "WEBP", {}),
        ("RGB", "WEBP", {"lossless": True}),
        ("RGBA", "WEBP", {"exif": b"Exif\0\0"}),
    ],
)
def test_pixels_are_those_of_the_header(size: tuple[int, int], mode: str, kind: str, options: dict[str, Any]) -> None:
    assert pixels(_file(size, mode, kind, **options)) == size[0] * size[1]


@given(st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd8\xff\xff", b"RIFF1234WEBPVP8X", b""]), st.binary())
def test_anything_has_a_number_of_pixels(start: bytes, rest: bytes) -> None:
    assert pixels(start + rest) >= 0


def test_requests_keep_to_the_servers_pixels(faulty: FaultyServer, faulty_client: EmbeddingClient) -> None:
    faulty.described.limits.max_request_pixels = 350
    files = [_file((10, 10), "L", "PNG")] * 4 + [_file((30, 30), "L", "PNG")] + [_file((10, 10), "L", "PNG")] * 2
    faulty_client.embed(files)
    assert sorted(len(request.encoded.files) for request in faulty.requests) == [1, 1, 2, 3]
