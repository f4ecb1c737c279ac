"""From a trained model to a bundle: codes, heads, measurements, ONNX, card."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from matvae_server import bundle
from matvae_server.card import Card, Metric
from matvae_training import device
from matvae_training.data import Split
from matvae_training.evaluate import evaluate, fit_quantiser
from matvae_training.export import INVARIANCE_BATCHES, ExportError, Servable, batch_invariance, export, throughput
from matvae_training.extras import kmeans_accuracy, reconstruction_mse, sampled_mlp_accuracy
from matvae_training.probes import LOGISTIC, MLP, ProbeConfig, train_heads


def write_bundle(
    model: Servable,
    *,
    train: Split,
    held: Split,
    split: str,
    classes: tuple[str, ...],
    out: Path,
    name: str,
    description: str,
    license: str = "Apache-2.0",
    provenance: Mapping[str, str],
    measure: bool = True,
    invariance_batches: Sequence[int] = INVARIANCE_BATCHES,
    sampled: Mapping[int, float] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Card:
    """Fit heads and quantiser on `train`, measure on `held` (the split of that name), and write the bundle `out`.

    Returns its card, which has `provenance` and, beside it, when and how fast. Without `measure` there are neither
    heads nor metrics, and only the images of `train` are read. `sampled` is what `sampled_accuracy` found of a code
    that was ordered since, or nothing where nobody asked; without it, that is measured here. `say` is told what is
    going on. The model may be on a GPU, and is on the CPU in the end. Raises ExportError, and OSError where `out`
    cannot be written.
    """
    network = model.config
    codes = encode(model, train.images)
    quantiser = fit_quantiser(codes)
    heads: list[bundle.Head] = []
    metrics: tuple[Metric, ...] = ()
    extra: dict[str, Mapping[int, float]] = {}
    if measure:
        say("heads: logistic and two-layer MLP of every prefix")
        heads = [
            head
            for probe in (LOGISTIC, MLP)
            for head in _heads(model, codes, train.labels, len(classes), probe).values()
        ]
        queries = encode(model, held.images)
        say(f"evaluate: {len(held)} {split} images against {len(train)}")
        metrics = evaluate(
            gallery=codes,
            gallery_labels=train.labels,
            queries=queries,
            query_labels=held.labels,
            prefixes=network.prefixes,
            classes=len(classes),
            quantiser=quantiser,
            heads=heads,
            split=split,
            where=device.of(model.encoder),
        )

        say("clusters, reconstructions, sampled codes")
        clusters = kmeans_accuracy(codes, train.labels, queries, held.labels, network.prefixes)
        extra["kmeans_accuracy"] = clusters["majority"]
        extra["kmeans_one_to_one_accuracy"] = clusters["one_to_one"]
        if model.decoder is not None:
            extra["reconstruction_mse"] = reconstruction_mse(model.decoder, queries, held.images, network.prefixes)
        if sampled is None and hasattr(model.encoder, "posterior"):
            sampled = sampled_mlp_accuracy(model.encoder, held.images, held.labels, heads)
        if sampled:
            extra["sampled_mlp_accuracy"] = sampled

    say("export")
    model.cpu()
    shown = held if measure else train
    sample = shown.images[torch.arange(256) % len(shown)]
    exported = export(model, sample)
    invariance = batch_invariance(model.encoder, exported.encoder, sample, invariance_batches)
    rate = throughput(exported.encoder, sample)

    tensors: bundle.Tensors = {key: value.contiguous().numpy() for key, value in model.state_dict().items()}
    for head in heads:
        part = f"head.{head.kind}.{head.dimensions}"
        tensors |= {f"{part}.mean": head.mean, f"{part}.scale": head.scale}
        for index, (weight, bias) in enumerate(head.layers):
            tensors |= {f"{part}.{index}.weight": weight, f"{part}.{index}.bias": bias}
    return bundle.save(
        out,
        card=Card(
            name=name,
            fingerprint="",
            description=description,
            license=license,
            network=network,
            classes=classes,
            quantiser=quantiser,
            metrics=metrics,
            heads=tuple((head.kind, head.dimensions) for head in heads),
            provenance={
                **provenance,
                **{key: json.dumps({m: round(value, 6) for m, value in each.items()}) for key, each in extra.items()},
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "batch_invariance": json.dumps(invariance),
                "encoder_throughput": f"{rate:.0f} images/s, onnxruntime, 1 thread, batch 64",
            },
        ),
        tensors=tensors,
        encoder_onnx=exported.encoder,
        decoder_onnx=exported.decoder,
    )


def sampled_accuracy(model: Servable, train: Split, held: Split, classes: int) -> dict[int, float]:
    """`extras.sampled_mlp_accuracy` by heads of this code as it is: ordering it keeps its means, not its posterior."""
    heads = _heads(model, encode(model, train.images), train.labels, classes, MLP)
    return sampled_mlp_accuracy(model.encoder, held.images, held.labels, heads.values())


def _heads(model: Servable, codes: Tensor, labels: Tensor, classes: int, probe: ProbeConfig) -> dict[int, bundle.Head]:
    """`train_heads`, where the model is."""
    where = device.of(model.encoder)
    return train_heads(codes.to(where), labels.to(where), model.config.prefixes, classes, probe)


@torch.inference_mode()
def encode(model: Servable, images: Tensor, batch_size: int = 1000) -> Tensor:
    """uint8 images (n, height, width, channels) -> float32 codes (n, dimensions), in eval mode.

    The codes are on the CPU, and computed where the model is; the images may be on either. Raises ExportError where a
    code is not finite: nobody could be served by such a model.
    """
    model.eval()
    where = device.of(model.encoder)
    codes = torch.cat([model.encoder(batch.to(where)).cpu() for batch in torch.split(images, batch_size)])
    if not torch.isfinite(codes).all():
        raise ExportError("the encoder gives codes that are not finite: train with a lower learning rate")
    return codes


def table(card: Card) -> str:
    """The card's accuracies as text: a row per metric and precision, a column per prefix."""
    values = {(metric.name, metric.precision, metric.dimensions): metric.value for metric in card.metrics}
    rows = sorted({key[:2] for key in values})
    lines = [f"{'':20}" + "".join(f"{prefix:7d}" for prefix in card.network.prefixes)]
    for name, precision in rows:
        cells = (f"{100 * values[name, precision, prefix]:7.2f}" for prefix in card.network.prefixes)
        lines.append(f"{name:11}{precision:9}" + "".join(cells))
    return "\n".join(lines)
