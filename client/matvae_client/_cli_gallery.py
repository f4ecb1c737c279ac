"""`matvae gallery` and `matvae pull`: codes that were computed once, taken at the size that this machine can afford."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from matvae import store
from matvae.v1 import codec
from matvae_client import _cli_files as files
from matvae_client import _cli_output as output
from matvae_client._budget import Budget
from matvae_client._card import ModelCard
from matvae_client._cli_arguments import connect, positive, size
from matvae_client._client import EmbeddingClient
from matvae_client._codes import Codes
from matvae_client._errors import InvalidRequestError, NotFoundError
from matvae_client._store import CodesDirectory

BUILD_EXAMPLES = """\
examples:
  matvae gallery build galleries/photos photos         whole codes of every image under photos
  matvae gallery build galleries/photos more.codes     and those of a codes file of all dimensions, float32
  matvae-serve --gallery photos=galleries/photos       keeps it for clients to pull

What is there already is not computed again. A server that keeps the gallery needs no restart.
"""
PULL_EXAMPLES = """\
examples:
  matvae pull photos --out photos --memory 8MB         the prefix and precision that fit, and classify best by k-NN
  matvae pull photos --out photos                      again later: only what changed is sent
  matvae pull photos --out p32 --dimensions 32 --precision int8
  matvae search photos --query-codes query.codes       needs no server any more

A pull that breaks off goes on where it was when it is run again.
"""


def build(options: argparse.Namespace) -> int:
    """`matvae gallery build`."""
    directory = files.open_directory(options.folder)
    _require_utf8(directory.ids(), f"make the gallery in another folder than {options.folder}")
    added = 0
    failed: list[tuple[str, str]] = []
    with connect(options) as client:
        for path in options.paths:
            if path.suffix == ".codes" or (path / store.MANIFEST).is_file():
                added += _add_codes(directory, Codes.load(path), client.model(), path)
            else:
                names = files.list_files([path])
                _require_utf8(names, "rename the file")
                count, problems = files.embed_into(directory, client, names, dimensions=None, precision="float32")
                added += count
                failed += problems
    output.print_directory(directory, added, failed, as_json=options.json)
    return output.report(failed)


def show(options: argparse.Namespace) -> int:
    """`matvae gallery list`."""
    with connect(options) as client:
        galleries = client.galleries()
    if options.json:
        fields = ("name", "count", "version", "dimensions", "fingerprint")
        output.print_json([{field: getattr(gallery, field) for field in fields} for gallery in galleries])
    for gallery in () if options.json else galleries:
        print(f"{gallery.name:<24} {gallery.count:>12} codes  version {gallery.version}")
    return 0


def pull(options: argparse.Namespace) -> int:
    """`matvae pull`."""
    held = files.open_directory(options.out).like
    dimensions, precision = options.dimensions, options.precision or "float32"
    if options.memory is not None and (options.dimensions or options.precision):
        raise InvalidRequestError.of("memory", "it chooses --dimensions and --precision: give it or them, not both")
    with connect(options) as client:
        if options.memory is not None:
            budget = Budget(total_bytes=options.memory, vectors=_count(client, options.gallery))
            plan = budget.plan(client.model())
            dimensions, precision = plan.dimensions, plan.precision
        elif held is not None and not options.dimensions and not options.precision:
            dimensions, precision = held.dimensions, held.precision
        codes = client.pull(options.gallery, dimensions=dimensions, precision=precision, into=options.out)
    output.print_codes(codes, options.out, (), as_json=options.json)
    return 0


def _count(client: EmbeddingClient, name: str) -> int:
    galleries = {gallery.name: gallery.count for gallery in client.galleries()}
    if name not in galleries:
        raise NotFoundError(f"no gallery {name!r} here; there are: {', '.join(galleries) or 'none'}")
    return galleries[name]


def _require_utf8(ids: Iterable[str], todo: str) -> None:
    """Refuse ids that no client could ever pull, before anything is computed for them."""
    try:
        store.require_utf8(ids)
    except store.StoreError as error:
        raise InvalidRequestError.of("ids", f"{error}: {todo}") from None


def _add_codes(directory: CodesDirectory, codes: Codes, card: ModelCard, path: Path) -> int:
    if (codes.offset, codes.dimensions, codes.precision) != (0, card.dimensions, "float32"):
        raise InvalidRequestError.of(
            "codes", f"{path} holds {codes!r}, a gallery whole codes: embed with {card.dimensions} dimensions, float32"
        )
    if codes.ids is None:
        raise InvalidRequestError.of("ids", f"{path} has none: a gallery needs an id for each of its codes")
    _require_utf8(codes.ids, f"embed again what {path} holds, under another name")
    held = set(directory.ids())
    new = [place for place, name in enumerate(codes.ids) if name not in held]
    directory.append(codes[new])
    return len(new)


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `matvae gallery build`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="the codes directory to make, or to add to")
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="an image, a folder of images, or codes (FILE.codes, DIR)"
    )


def add_pull_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `matvae pull`."""
    parser.add_argument("gallery", metavar="NAME", help="a gallery of the server: see matvae gallery list")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder that becomes a copy")
    parser.add_argument(
        "--dimensions", type=positive, metavar="M", help="how many leading coordinates; default: all of them"
    )
    parser.add_argument("--precision", choices=codec.PRECISIONS, help="default float32")
    parser.add_argument(
        "--memory", type=size, metavar="SIZE", help="choose both, so that all codes fit: 8MB, 512KiB, a number of bytes"
    )
