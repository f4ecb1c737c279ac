"""What the Mat-VAE report (Padhye, Paliwal, Jindal, Gupta: CS726 project, IIT Bombay) measured: the curves to beat.

Mean test accuracy in % over five folds of a two-layer classifier on the posterior mean ("MMD-MRL MAP", "MMD MAP").
Its encoder saw no labels, as ours did not; its classifier did, as our heads did.
"""

from __future__ import annotations

ONE_MODEL = {
    "mnist": {2: 13.791, 4: 43.344, 8: 89.411, 16: 96.295, 32: 97.978, 64: 98.4, 128: 98.436},  # table 8
    "fashion-mnist": {2: 36.594, 4: 68.679, 8: 79.11, 16: 83.262, 32: 86.24, 64: 86.5, 128: 86.833},  # table 15
    "cifar10": {2: 10.924, 4: 15.95, 8: 26.532, 16: 36.278, 32: 40.394, 64: 42.857, 128: 43.62},  # table 22
}
"""By data set and dimensions: one Matryoshka model for all sizes."""

ONE_PER_SIZE = {
    "mnist": {2: 11.662, 8: 95.422, 16: 97.918, 32: 98.352, 64: 98.464, 128: 98.498},  # table 4
    "fashion-mnist": {2: 68.204, 8: 83.514, 16: 86.562, 32: 88.256, 64: 89.166, 128: 89.354},  # table 12
    "cifar10": {2: 12.178, 8: 16.224, 16: 37.658, 32: 44.106, 64: 51.348, 128: 53.648},  # table 19
}
"""By data set and dimensions: a model of its own for every size. There is none of 4 dimensions."""


def curves(dataset: str) -> dict[str, dict[int, float]]:
    """Fractions by dimensions, of each curve's name; none for a data set that the report has not."""
    return {
        name: {m: value / 100 for m, value in table[dataset].items()}
        for name, table in (("one model", ONE_MODEL), ("one per size", ONE_PER_SIZE))
        if dataset in table
    }
