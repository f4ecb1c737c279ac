"""The card for people: Markdown with the front matter that Hugging Face reads, from a bundle's `card.json`.

No torch here. Scalars are written as JSON, which YAML contains, so that no name can break out of its place.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from matvae.v1 import codec
from matvae_server.card import Card, Metric

_ACCURACIES = {"knn": "10 nearest neighbours", "logistic": "logistic regression", "mlp": "two-layer MLP"}
_TITLES = _ACCURACIES | {"recall@10": "recall@10 of the full float32 code's neighbours"}


def render(card: Card) -> str:
    """The whole file, newline at its end."""
    network = card.network
    shape = f"{network.height} x {network.width}, {'grey' if network.channels == 1 else 'RGB'}"
    lines = [
        "---",
        *_front_matter(card),
        "---",
        "",
        f"# {_cell(card.name)}",
        "",
        card.description,
        "",
        "| | |",
        "|---|---|",
        f"| images | {shape}; others are brought to it by `{card.resize_rule}` |",
        f"| code | {network.dimensions} dimensions, posterior means; trained prefixes {_listed(network.prefixes)} |",
        f"| classes | {len(card.classes)}: {_listed(map(_cell, card.classes))} |",
        f"| heads | {_heads(card)} |",
        f"| decoder | {'yes' if 'decoder.onnx' in card.files else 'no'} |",
        f"| licence | {_cell(card.license)} |",
        f"| fingerprint | `{card.fingerprint}` |",
        "",
        "Codes of different fingerprints do not mix. A code is not anonymous where there is a decoder.",
        "",
        "## Use",
        "",
        "```console",
        "$ matvae-serve --bundle ./BUNDLE",
        f"$ matvae embed photos --out photos.codes --dimensions {_middle(network.prefixes)} --precision int8",
        "```",
        "",
        "## Quality",
        "",
        *_quality(card),
        "## Provenance",
        "",
        *(f"- {_cell(name)}: {_cell(value)}" for name, value in card.provenance.items()),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _front_matter(card: Card) -> Iterator[str]:
    yield f"license: {json.dumps(card.license.lower())}"
    yield "library_name: matvae"
    yield "pipeline_tag: image-feature-extraction"
    yield "tags:"
    yield from (f"- {tag}" for tag in ("matryoshka", "embeddings", "autoencoder", "onnx"))
    dataset = json.dumps(card.provenance.get("dataset", card.name))
    yield f"datasets:\n- {dataset}"
    accuracies = [metric for metric in card.metrics if metric.name in _ACCURACIES]
    if not accuracies:
        return
    yield "metrics:\n- accuracy"
    yield f"model-index:\n- name: {json.dumps(card.name, ensure_ascii=False)}\n  results:"
    yield "  - task:\n      type: image-classification"
    yield f"    dataset:\n      name: {dataset}\n      type: {dataset}\n      split: {json.dumps(accuracies[0].split)}"
    yield "    metrics:"
    for metric in accuracies:
        name = f"{_ACCURACIES[metric.name]}, {metric.dimensions} dimensions, {metric.precision}"
        yield f"    - type: accuracy\n      name: {json.dumps(name)}\n      value: {metric.value}"


def _quality(card: Card) -> Iterator[str]:
    if not card.metrics:
        yield "Not measured.\n"
        return
    counts = sorted({(metric.n, metric.split) for metric in card.metrics})
    seen = " and ".join(f"{n:,} images of the {split} split" for n, split in counts)
    yield f"In %, on {seen}, with the half-width of the wider 95 % Wilson interval of the row.\n"
    values = {(metric.name, metric.precision, metric.dimensions): metric for metric in card.metrics}
    for name in dict.fromkeys(metric.name for metric in card.metrics):
        yield f"### {_TITLES.get(name, name)}\n"
        yield f"| precision | {' | '.join(str(m) for m in card.network.prefixes)} | ± |"
        yield "|---|" + "---:|" * (len(card.network.prefixes) + 1)
        for precision in codec.PRECISIONS:
            row = [values.get((name, precision, m)) for m in card.network.prefixes]
            if any(row):
                cells = " | ".join(f"{100 * metric.value:.1f}" if metric else "" for metric in row)
                yield f"| {precision} | {cells} | {_half_width(row):.1f} |"
        yield ""


def _half_width(row: Iterable[Metric | None]) -> float:
    return max(50 * (metric.interval[1] - metric.interval[0]) for metric in row if metric)


def _heads(card: Card) -> str:
    kinds = {kind: [m for other, m in card.heads if other == kind] for kind, _ in card.heads}
    return "; ".join(f"{kind} of {_listed(prefixes)}" for kind, prefixes in kinds.items()) or "none"


def _middle(prefixes: tuple[int, ...]) -> int:
    return prefixes[len(prefixes) // 2]


def _listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))


def _cell(text: str) -> str:
    """Text that stays in its cell and is not taken for markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
