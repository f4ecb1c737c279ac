"""`matvae`: the client as a command. Results go to stdout, everything else to stderr.

Exit status: 0; 1 for an error, or where some image failed (the others are done); 2 for wrong usage; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from matvae import __version__
from matvae.v1 import codec
from matvae_client import _cli_decode as decode
from matvae_client import _cli_files as files
from matvae_client import _cli_folder as folder
from matvae_client import _cli_gallery as gallery
from matvae_client import _cli_output as output
from matvae_client import _cli_plan as plan
from matvae_client import _sheet as sheet
from matvae_client._card import HEAD_KINDS
from matvae_client._cli_arguments import add_server_arguments, connect, positive
from matvae_client._codes import Codes
from matvae_client._errors import InvalidRequestError, MatvaeError
from matvae_client._files import replacing
from matvae_client._index import PrefixIndex
from matvae_client._store import is_copy, load_parts

_EXAMPLES = """\
examples:
  matvae info                                          what the server computes, and how good each prefix is
  matvae plan --vectors 1e6 --memory 64MB              which prefix and precision that buys
  matvae embed photos --out photos.codes --dimensions 32 --precision int8
  matvae search photos.codes query.png -k 5            the nearest photos; the codes stay on this machine
  matvae pull photos --memory 8MB                      codes that the server computed, at the size that fits
  matvae classify query.png --dimensions 32 --kind mlp
  matvae decode photos --out sheet.png                 what each prefix of a code still shows of its image

A server must be running: matvae-serve, on this machine or another (--server HOST:PORT, or MATVAE_SERVER).
Each command has its own --help.
"""
_EMBED_EXAMPLES = (
    """\
examples:
  matvae embed photos --out photos.codes                       every PNG, JPEG, WebP under photos, float32
  matvae embed a.png b.jpg --out two.codes --dimensions 32 --precision int8     32 bytes per image
  matvae embed photos --out tiny.codes --dimensions 64 --precision binary       8 bytes per image

  matvae embed photos --out photos-32 --dimensions 32          a folder of codes, to which a second run adds new files

The ids of the codes are the paths of the files. A file that cannot be used, or a folder that cannot be read, is left
out and reported at the end, with --json under "errors", too; the exit status is 1 then. Images of other kinds in a
folder are left out and counted. An --out with a suffix is a file, written at the end, unless all failed; one without is
a folder, in which what is done stays done. The folder of a matvae pull is refused: no pull would work in it any more.

"""
    + folder.HELP
)
_SEARCH_EXAMPLES = """\
examples:
  matvae search photos.codes query.png                 the 10 nearest
  matvae search photos.codes queries -k 3 --json       for programs
  matvae search photos.codes query.png --html found.html           to look at
  matvae search photos --query-codes query.codes       with codes that you have: no server is needed

Queries are embedded at the dimensions and the precision of the codes. Query codes that are longer are cut to the same,
and float32 ones packed, so whole codes (matvae embed query.png --out query.codes) fit any. Distances are squared
Euclidean, for binary codes the number of bits that differ. A query that cannot be used is left out and reported at the
end, with --json as {"path": ..., "message": ...} at the end of the list, too; the exit status is 1 then.
"""
_CLASSIFY_EXAMPLES = """\
examples:
  matvae classify shoe.png                             the logistic head of all dimensions
  matvae classify photos --dimensions 32 --kind mlp    the MLP of the first 32; matvae info --json lists the heads

A file that cannot be used is left out and reported at the end, with --json as {"path": ..., "message": ...} at the end
of the list, too; the exit status is 1 then.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    output.prepare_streams()
    try:
        options = _parser().parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = options.run
        status = run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read us has enough. Python would complain while it flushes stdout on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (MatvaeError, OSError) as error:
        output.complain(str(error))
        return 1
    return status


def _info(options: argparse.Namespace) -> int:
    with connect(options) as client:
        card = client.model()
    if options.json:
        output.print_json(card.to_dict())
    else:
        output.print_card(card)
    return 0


def _embed(options: argparse.Namespace) -> int:
    if not options.out.parent.is_dir():
        raise NotADirectoryError(f"{options.out.parent} is not a folder")
    kind = {"dimensions": options.dimensions, "precision": options.precision}
    if options.out.is_dir() or not options.out.suffix:
        directory = files.open_directory(options.out, "--out")
        if "gallery" in directory.source:
            return output.refuse_copy(directory)
        with connect(options) as client, folder.turn(directory, client, output.complain):
            listing = files.list_files(options.paths, output.complain)
            done = folder.update(directory, client, options.paths, listing, **kind, prune=options.prune)
            output.print_directory(directory, done, as_json=options.json)
        return output.report(done.failed)
    if options.prune:
        raise InvalidRequestError.of("--prune", "a codes file is written anew each time: it is for folders of codes")
    files.check_file(options.out, "--out", files.CODES, options.paths)
    with connect(options) as client:
        codes, failed = files.embed_files(client, options.paths, output.complain, **kind)
    if len(codes):
        codes.save(options.out)
    output.print_codes(codes, options.out, failed, as_json=options.json)
    return output.report(failed, unwritten=None if len(codes) else options.out)


def _search(options: argparse.Namespace) -> int:
    if options.html is not None:
        files.check_file(options.html, "--html", files.PAGE, options.queries)
    parts = load_parts(options.codes)
    stored = parts[0]  # what all have in common
    failed: list[tuple[str, str]] = []
    if options.query_codes is not None:
        queries = files.fit_queries(Codes.load(options.query_codes), options.query_codes, stored, options.codes)
    else:
        with connect(options) as client:
            queries, failed = files.embed_files(
                client,
                options.queries,
                output.complain,
                dimensions=stored.dimensions,
                offset=stored.offset,
                precision=stored.precision,
            )
    names = queries.ids or tuple(str(place) for place in range(len(queries)))
    index = PrefixIndex()
    for part in parts:  # without a copy of all beside the index
        index.add(part)
    found = index.search(queries, options.k)
    if options.html is not None:
        root, foreign = options.images_root or Path(), is_copy(options.codes)
        foreign_queries = options.query_codes is not None and is_copy(options.query_codes)
        page = sheet.render(names, found, root, foreign_queries=foreign_queries, foreign_names=foreign)
        with replacing(options.html) as new:
            new.write_text(page.html, encoding="utf-8", errors="backslashreplace")
        if page.missing:
            output.complain(
                f"{options.html}: {page.missing} of {page.names} pictures were not found, looked for relative to "
                f"{root.absolute()}{', and only in there, for a server named them' if foreign else ''}: "
                "--images-root DIR looks elsewhere"
            )
    output.print_neighbours(names, found, failed, as_json=options.json)
    return output.report(failed)


def _classify(options: argparse.Namespace) -> int:
    with connect(options) as client:
        dimensions = options.dimensions or client.model().dimensions
        classifier = client.classifier(dimensions, options.kind)
        codes, failed = files.embed_files(client, options.paths, output.complain, dimensions=dimensions)
    probabilities = classifier.predict_proba(codes)
    output.print_labels(codes.ids or (), classifier.classes, probabilities, failed, as_json=options.json)
    return output.report(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="matvae",
        description="Embed images at the size that you can afford; search and classify on your own machine.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # or --k were --key
    )
    parser.add_argument("--version", action="version", version=f"matvae {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str,
        run: Callable[[argparse.Namespace], int],
        help_text: str,
        epilog: str | None = None,
        group: argparse._SubParsersAction[argparse.ArgumentParser] = commands,
    ) -> argparse.ArgumentParser:
        sub = group.add_parser(
            name,
            help=help_text,
            description=help_text[0].upper() + help_text[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        add_server_arguments(sub)
        sub.add_argument("--json", action="store_true", help="print JSON, for programs")
        return sub

    command("info", _info, "show the model's card: input, prefixes, measured quality")

    plan.add_arguments(command("plan", plan.run, plan.HELP, plan.EXAMPLES))

    embed = command("embed", _embed, "compute the codes of images and save them", _EMBED_EXAMPLES)
    embed.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=files.IMAGES)
    embed.add_argument("--out", required=True, type=Path, metavar="FILE-or-DIR", help="the codes to write")
    embed.add_argument("--prune", action="store_true", help="remove the codes of pictures that are gone; for a folder")
    _add_dimensions(embed)
    embed.add_argument("--precision", default="float32", choices=codec.PRECISIONS, help="default float32")

    search = command("search", _search, "find the nearest codes of query images", _SEARCH_EXAMPLES)
    search.add_argument("codes", type=Path, metavar="CODES", help="what `matvae embed` or `matvae pull` wrote")
    asked = search.add_mutually_exclusive_group(required=True)
    asked.add_argument("queries", nargs="*", default=[], type=Path, metavar="QUERY", help=files.IMAGES)
    asked.add_argument("--query-codes", type=Path, metavar="CODES", help="codes to search for, instead of images")
    search.add_argument("-k", "--k", type=positive, default=10, metavar="K", help="neighbours per query; default 10")
    search.add_argument("--html", type=Path, metavar="FILE", help="write a page that shows what was found, too")
    search.add_argument(
        "--images-root",
        type=Path,
        metavar="DIR",
        help="what relative names on that page are relative to; default: here",
    )

    galleries = commands.add_parser(
        "gallery", help="make and list galleries: codes that a server keeps to be pulled", allow_abbrev=False
    )
    of_galleries = galleries.add_subparsers(required=True, metavar="COMMAND")
    gallery.add_build_arguments(
        command(
            "build", gallery.build, "compute whole codes into a gallery", gallery.BUILD_EXAMPLES, group=of_galleries
        )
    )
    command("list", gallery.show, "list the galleries of the server", group=of_galleries)
    gallery.add_pull_arguments(
        command("pull", gallery.pull, "copy a gallery, at the size that you can afford", gallery.PULL_EXAMPLES)
    )

    classify = command("classify", _classify, "name the class of images", _CLASSIFY_EXAMPLES)
    classify.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=files.IMAGES)
    _add_dimensions(classify)
    classify.add_argument("--kind", default="logistic", choices=HEAD_KINDS, help="default logistic")

    decode.add_arguments(command("decode", decode.run, decode.HELP, decode.EXAMPLES))
    return parser


def _add_dimensions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dimensions", type=positive, metavar="M", help="how many leading coordinates; default: all of them"
    )
