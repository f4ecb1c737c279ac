"""`matvae gallery` and `matvae pull`: codes that were computed once, taken at the size that this machine can afford."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from matvae import store
from matvae.v1 import codec
from matvae_client import _cli_files as files
from matvae_client import _cli_folder as folder
from matvae_client import _cli_output as output
from matvae_client._budget import Budget, Plan
from matvae_client._card import ModelCard
from matvae_client._cli_arguments import connect, positive, size
from matvae_client._client import EmbeddingClient
from matvae_client._codes import Codes, describe
from matvae_client._errors import InvalidRequestError, NotFoundError
from matvae_client._store import CodesDirectory

BUILD_EXAMPLES = (
    """\
examples:
  matvae gallery build galleries/photos photos         whole codes of every PNG, JPEG, WebP under photos
  matvae gallery build galleries/photos more.codes     and those of a codes file of all dimensions, float32
  matvae-serve --gallery photos=galleries/photos       keeps it for clients to pull

A server that keeps the gallery needs no restart.

"""
    + folder.HELP
    + """
A file that cannot be used is left out and reported at the end, with --json under "errors", too; the exit status is 1
then. Images of other kinds in a folder are left out and counted.
"""
)
PULL_EXAMPLES = """\
examples:
  matvae pull photos --memory 8MB                      the prefix and precision that fit, and classify best by k-NN
  matvae pull photos                                   again later: only what changed is sent, at the same size
  matvae pull photos --out p32 --dimensions 32 --precision int8
  matvae search photos --query-codes query.codes       needs no server any more

The copy is a folder of the gallery's name, or --out. A pull that breaks off goes on where it was when it is run again.
Query codes need not be of the copy's size: whole ones (matvae embed query.png --out query.codes) fit any copy.
"""

_BLOCK_ROWS = 2**16


def build(options: argparse.Namespace) -> int:
    """`matvae gallery build`."""
    directory = files.open_directory(options.folder, "DIR")
    if "gallery" in directory.source:
        return output.refuse_copy(directory)
    done = folder.Done()
    with connect(options) as client, folder.turn(directory, client, output.complain):
        _require_utf8(directory.ids(), f"make the gallery in another folder than {options.folder}")
        for path in options.paths:
            if path.suffix == ".codes" or (path / store.MANIFEST).is_file():
                done.added += _add_codes(directory, Codes.load(path), client.model(), path)
            else:
                listing = files.list_files([path], output.complain)
                _require_utf8(listing.files, "rename the file")
                done += folder.update(
                    directory, client, [path], listing, dimensions=None, precision="float32", prune=options.prune
                )
        output.print_directory(directory, done, as_json=options.json)
    return output.report(done.failed)


def show(options: argparse.Namespace) -> int:
    """`matvae gallery list`."""
    with connect(options) as client:
        galleries = client.galleries()
    if options.json:
        fields = ("name", "count", "version", "dimensions", "fingerprint")
        output.print_json([{field: getattr(gallery, field) for field in fields} for gallery in galleries])
    for gallery in () if options.json else galleries:
        print(output.visible(f"{gallery.name:<24} {gallery.count:>12} codes  version {gallery.version}"))
    return 0


def pull(options: argparse.Namespace) -> int:
    """`matvae pull`."""
    out = options.out or _folder_for(options.gallery)
    copy = files.open_directory(out, "--out")
    held, dimensions, precision = copy.like, options.dimensions, options.precision or "float32"
    before = copy.codes() if held is not None else None
    plan: Plan | None = None
    if options.memory is not None and (options.dimensions or options.precision):
        raise InvalidRequestError.of("memory", "it chooses --dimensions and --precision: give it or them, not both")
    with connect(options) as client:
        if options.memory is not None:
            count = _count(client, options.gallery)
            plan = Budget(total_bytes=options.memory, vectors=count).plan(client.model())
            dimensions, precision = plan.dimensions, plan.precision
            if held is not None and (held.dimensions, held.offset, held.precision) != (dimensions, 0, precision):
                raise InvalidRequestError.of(
                    "memory",
                    f"{options.memory:,} bytes for the {count:,} codes that the gallery has now mean {dimensions}-d "
                    f"{precision}, and the copy in {out} is {describe(held)} ({count * held.bytes_per_vector:,} "
                    "bytes): pull into another folder (--out), or without --memory, which keeps the copy's size",
                )
        elif held is not None and not options.dimensions and not options.precision:
            dimensions, precision = held.dimensions, held.precision
        codes = client.pull(options.gallery, dimensions=dimensions, precision=precision, into=out)
    output.print_pull(codes, out, plan, None if before is None else _changes(before, codes), as_json=options.json)
    return 0


def _folder_for(gallery: str) -> Path:
    """The folder of that name. Raises InvalidRequestError where it would be somewhere else than here."""
    if Path(gallery).name != gallery or gallery.startswith("."):
        raise InvalidRequestError.of("out", f"{gallery!r} is no name for a folder here: give --out DIR")
    return Path(gallery)


def _changes(before: Codes, after: Codes) -> folder.Done:
    """What an incremental pull changed."""
    old = {name: place for place, name in enumerate(before.ids or ())}
    kept = np.array(
        [(old[name], place) for place, name in enumerate(after.ids or ()) if name in old], np.int64
    ).reshape(-1, 2)
    changed = 0
    for start in range(0, len(kept), _BLOCK_ROWS):
        was, now = kept[start : start + _BLOCK_ROWS].T
        changed += int((before.rows[was] != after.rows[now]).any(axis=1).sum())
    return folder.Done(added=len(after) - len(kept), changed=changed, removed=len(before) - len(kept))


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
            "codes",
            f"{path} holds {describe(codes)}, a gallery whole codes: embed with {card.dimensions} dimensions, float32",
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
        "paths", nargs="+", type=Path, metavar="PATH", help=f"{files.IMAGES}, or codes (FILE.codes, DIR)"
    )
    parser.add_argument("--prune", action="store_true", help="remove the codes of pictures that are gone")


def add_pull_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `matvae pull`."""
    parser.add_argument("gallery", metavar="NAME", help="a gallery of the server: see matvae gallery list")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder that becomes a copy; default: NAME")
    parser.add_argument(
        "--dimensions", type=positive, metavar="M", help="how many leading coordinates; default: all of them"
    )
    parser.add_argument("--precision", choices=codec.PRECISIONS, help="default float32")
    parser.add_argument(
        "--memory", type=size, metavar="SIZE", help="choose both, so that all codes fit: 8MB, 512KiB, a number of bytes"
    )
