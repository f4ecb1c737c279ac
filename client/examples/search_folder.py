"""Search a folder of images with 32 bytes per image: python search_folder.py FOLDER QUERY [HOST:PORT]

The folder is embedded once, into FOLDER/matvae.codes; the index lives in this process.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from matvae_client import Codes, EmbeddingClient, PrefixIndex


def main(folder: Path, query: Path, target: str = "localhost:50051") -> None:
    """Print the five images of `folder` that are nearest to `query`."""
    stored = folder / "matvae.codes"
    with EmbeddingClient(target) as client:
        if not stored.exists():
            images = sorted(folder.glob("*.png"))
            codes = client.embed(images, dimensions=32, precision="int8")
            dataclasses.replace(codes, ids=tuple(image.name for image in images)).save(stored)
        gallery = Codes.load(stored)
        wanted = client.embed(query, dimensions=gallery.dimensions, precision=gallery.precision)
    distances, names = PrefixIndex(gallery).search(wanted, k=5)
    for distance, name in zip(distances[0], names[0], strict=True):
        print(f"{distance:8.3f}  {name}")


if __name__ == "__main__":
    folder, query, *target = sys.argv[1:]
    main(Path(folder), Path(query), *target)
