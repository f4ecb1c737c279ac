"""Write proto/golden/fashion-mnist.json anew: `python tests/server/make_golden.py`, after the packaged bundle changed.

The file: `fingerprint`; `pixels`, base64 of uint8 (4, 28, 28, 1); `quantiser`, for each of its parts the base64 of
float32 (128,); `codes`, for each precision the base64 of 4 rows of all 128 dimensions. All as the wire carries them.
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
    quantiser = bundle.card.quantiser
    codes = {precision: codec.pack(vectors, precision, quantiser) for precision in codec.PRECISIONS}
    ranges = codec.quantiser_to_proto(quantiser)
    golden = {
        "fingerprint": bundle.card.fingerprint,
        "pixels": _base64(pixels.tobytes()),
        "quantiser": {name: _base64(getattr(ranges, name)) for name in codec.QUANTISER_FIELDS},
        "codes": {precision: _base64(rows.tobytes()) for precision, rows in codes.items()},
    }
    path = Path(__file__).parents[2] / "proto" / "golden" / "fashion-mnist.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(golden, indent=1) + "\n")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


if __name__ == "__main__":
    main()
