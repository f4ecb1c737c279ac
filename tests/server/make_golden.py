"""Write proto/golden/fashion-mnist.json anew: `python tests/server/make_golden.py`, after the packaged bundle changed.

The file: `fingerprint`; `pixels`, base64 of uint8 (4, 28, 28, 1); `codes`, for each precision the base64 of 4 rows of
all 128 dimensions, as the wire carries them.
"""

import base64
import json
from pathlib import Path

from matvae.v1 import codec
from matvae_bench.images import LabelledImages
from matvae_server import bundle as bundles
from matvae_server import runtimes

COUNT = 4


def main() -> None:
    bundle = bundles.load(bundles.find(bundles.DEFAULT))
    pixels = LabelledImages.sample().query_images[:COUNT]
    vectors = runtimes.choose("onnxruntime", bundle, threads=1).encode(pixels)
    codes = {precision: codec.pack(vectors, precision, bundle.card.quantiser) for precision in codec.PRECISIONS}
    golden = {
        "fingerprint": bundle.card.fingerprint,
        "pixels": base64.b64encode(pixels.tobytes()).decode(),
        "codes": {precision: base64.b64encode(rows.tobytes()).decode() for precision, rows in codes.items()},
    }
    path = Path(__file__).parents[2] / "proto" / "golden" / "fashion-mnist.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
