"""Search a server's gallery with 32 bytes per image in memory: python pull_gallery.py NAME QUERY [HOST:PORT]

The first run copies the gallery's 32-d int8 codes into NAME-32; later ones fetch what changed. The rest of a code, its
tail, is fetched for the hundred that the short codes find, and for no other.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matvae_client import EmbeddingClient, PrefixIndex


def main(name: str, query: Path, target: str = "localhost:50051") -> None:
    """Print the five images of the gallery that are nearest to `query`."""
    with EmbeddingClient(target) as client:
        heads = client.pull(name, dimensions=32, precision="int8", into=f"{name}-32")
        wanted = client.embed(query)
        shortlist = PrefixIndex()
        shortlist.add(heads, range(len(heads)))
        found = heads[shortlist.search(wanted.truncate(32), k=100).ids[0]]
        tails = client.pull(name, ids=found.ids, dimensions=128, offset=32, precision="int8")
    whole = found.extend(tails)
    distances, names = PrefixIndex(whole).search(wanted, k=5)
    for distance, image in zip(distances[0], names[0], strict=True):
        print(f"{distance:8.3f}  {image}")


if __name__ == "__main__":
    name, query, *target = sys.argv[1:]
    main(name, Path(query), *target)
