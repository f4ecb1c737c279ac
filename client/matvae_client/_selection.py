"""Which version of a gallery a pull asks for, and which of its codes."""

from __future__ import annotations

from collections.abc import Sequence

from matvae import store
from matvae.v1 import embedding_pb2 as pb
from matvae_client._errors import InvalidRequestError
from matvae_client._files import PathLike


def select(request: pb.PullGalleryRequest, *, version: int, ids: Sequence[str] | None, into: PathLike | None) -> None:
    """Put the version and the rows wanted into `request`. Raises InvalidRequestError where they cannot be."""
    if not 0 <= version < 2**64:
        raise InvalidRequestError.of("version", f"{version} is no version: they count from 1, and 0 is the newest")
    request.version = version
    if ids is None:
        return
    if into is not None:
        raise InvalidRequestError.of("ids", "a directory becomes a copy of all: leave out `into`, and save the codes")
    if isinstance(ids, str) or not len(ids) or not all(isinstance(name, str) for name in ids):
        raise InvalidRequestError.of("ids", "they are one or more strings, each the id of a code; left out: all codes")
    try:
        store.require_utf8(ids)
    except store.StoreError as error:
        raise InvalidRequestError.of("ids", str(error)) from None
    request.ids.extend(ids)
