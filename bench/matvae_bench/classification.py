"""The commands `cascade` and `few-shot`. What they measure is in the modules of these names."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matvae_bench.arguments import whole_number, whole_numbers
from matvae_bench.output import print_table, save


def add_commands(
    add: Callable[[str, Any, str], argparse.ArgumentParser],
    add_server: Callable[[argparse.ArgumentParser], None],
    add_data: Callable[[argparse.ArgumentParser], None],
) -> None:
    """Add both to the parser that `add` adds to."""
    cascade = add("cascade", _cascade, "what a cascade spends and loses, on images that did not calibrate it")
    add_server(cascade)
    add_data(cascade)
    cascade.add_argument("--stages", type=whole_numbers(1), action="append", metavar="M,M,...", help="repeatable")
    cascade.add_argument("--max-loss", type=float, action="append", metavar="F", help="allowed loss; repeatable")
    cascade.add_argument("--kind", choices=("mlp", "logistic"), default="mlp", help="heads (default mlp)")
    cascade.add_argument("--precision", default="float32", help="of the codes (default float32)")
    cascade.add_argument("--halvings", type=whole_number(1), default=10, help="how many draws (default 10)")
    cascade.add_argument("--out", type=Path, help="JSON file for the results")

    few_shot = add("few-shot", _few_shot, "prototypes of classes that the encoder never saw, from a few images each")
    add_server(few_shot)
    add_data(few_shot)
    few_shot.add_argument(
        "--labels", type=whole_numbers(0), metavar="L,L,...", help="the unseen ones (default: the card says)"
    )
    few_shot.add_argument("--shots", type=whole_numbers(1), metavar="N,N,...", help="images per class (default 1,5,20)")
    few_shot.add_argument("--episodes", type=whole_number(1), default=100, help="draws of those images (default 100)")
    few_shot.add_argument("--out", type=Path, help="JSON file for the results")


def _cascade(options: argparse.Namespace) -> None:
    from matvae_bench import cascade
    from matvae_client import Credentials, EmbeddingClient

    images, labels, source = cascade.held_out(options.data_root, options.dataset)
    asked: dict[str, Any] = {"kind": options.kind, "precision": options.precision}
    with EmbeddingClient(options.server, credentials=Credentials.from_environment()) as client:
        card = client.model()
        fixed = list(cascade.fixed(client, images, labels, **asked))
        scores = list(
            cascade.measure(
                client,
                images,
                labels,
                ladders=options.stages or cascade.LADDERS,
                losses=options.max_loss or cascade.LOSSES,
                halvings=options.halvings,
                **asked,
            )
        )
    headings = ("cascade", "allowed", "dimensions", "points against the longest", "halvings", "bytes", "sent")
    title = f"{card.name}, {options.kind} heads, {options.precision}, {len(labels):,} images, {source}"
    print_table(title, headings, cascade.rows(scores, fixed))
    results = {"fingerprint": card.fingerprint, "images": source, "fixed": fixed, "cascades": scores}
    save(options.out, results | asked)


def _few_shot(options: argparse.Namespace) -> None:
    from matvae_bench import few_shot
    from matvae_bench.images import LabelledImages
    from matvae_client import Credentials, EmbeddingClient

    root = options.data_root
    images = LabelledImages.from_data_root(root, options.dataset) if root else LabelledImages.sample()
    with EmbeddingClient(options.server, credentials=Credentials.from_environment()) as client:
        card = client.model()
        unseen = options.labels or few_shot.unseen_labels(card)
        shots = options.shots or (1, 5, 20)
        scores = list(few_shot.measure(client, images, unseen=unseen, shots=shots, episodes=options.episodes))
    rows = [
        (
            str(s.dimensions),
            str(s.shots),
            _spread(s.unseen, s.unseen_std),
            _spread(s.seen, s.seen_std),
            _spread(s.among_unseen, s.among_unseen_std),
        )
        for s in scores
    ]
    headings = ("dimensions", "images per class", "unseen classes %", "other classes %", "unseen among themselves %")
    print_table(f"{card.name}: prototypes, {options.episodes} episodes, unseen {list(unseen)}", headings, rows)
    results = {"fingerprint": card.fingerprint, "images": images.source, "unseen_labels": list(unseen)}
    save(options.out, results | {"excluded": card.provenance.get("excluded_classes", "{}"), "scores": scores})


def _spread(mean: float, std: float) -> str:
    return f"{100 * mean:.1f} ± {100 * std:.1f}"
