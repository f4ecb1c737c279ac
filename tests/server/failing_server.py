"""A server whose encoder raises for batches that hold a white image: `python failing_server.py [FLAGS]`."""

import sys

import numpy as np

from matvae_server import cli, runtimes


def main() -> int:
    encode = runtimes.OnnxEncoder.encode

    def failing(self: runtimes.OnnxEncoder, images: np.ndarray) -> np.ndarray:
        if (images == 255).all(axis=(1, 2, 3)).any():
            raise RuntimeError("the encoder broke on /a/secret/path")
        return encode(self, images)

    runtimes.OnnxEncoder.encode = failing  # type: ignore[method-assign]
    return cli.main(["--port", "0", "--runtime", "onnxruntime", *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(main())
