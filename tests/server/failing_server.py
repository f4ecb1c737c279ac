"""A server whose encoder raises for batches that hold a white image, and is lost by one that holds a grey image.

python failing_server.py [FLAGS]
"""

import sys

import numpy as np

from matvae_server import cli, runtimes
from matvae_server.batcher import EncoderLostError


def main() -> int:
    encode = runtimes.OnnxEncoder.encode
    lost = False

    def failing(self: runtimes.OnnxEncoder, images: np.ndarray) -> np.ndarray:
        nonlocal lost
        if (images == 255).all(axis=(1, 2, 3)).any():
            raise RuntimeError("the encoder broke on /a/secret/path")
        lost = lost or bool((images == 127).all(axis=(1, 2, 3)).any())
        if lost:
            raise EncoderLostError("the GPU computes nothing more for this process: unspecified launch failure")
        return encode(self, images)

    runtimes.OnnxEncoder.encode = failing  # type: ignore[method-assign]
    return cli.main(["--port", "0", "--runtime", "onnxruntime", *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(main())
