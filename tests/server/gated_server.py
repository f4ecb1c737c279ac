"""A server whose encoder and decoder wait at a gate: `python gated_server.py FIFO`.

Once it is warm, each batch, and each call of Decode, waits until somebody has the FIFO open for writing. One thread
decodes. It cuts off what it does not wait for sooner than the real one, so that a test need not be slow to see the
difference. Where SECONDS_PER_IMAGE is set, it believes that an image takes so long, so that a test knows what it
predicts.
"""

import os
import sys
from pathlib import Path

import numpy as np

from matvae.v1 import embedding_pb2 as pb
from matvae_server import admission, cli, decoder, decoding, runtimes, server


def main(gate: Path) -> int:
    encode = runtimes.OnnxEncoder.encode

    def wait() -> None:
        print("at the gate", flush=True)
        gate.open().close()

    def gated(self: runtimes.OnnxEncoder, images: np.ndarray) -> np.ndarray:
        if serving:
            wait()
        return encode(self, images)

    decode = decoder.Decoder.decode

    def gated_decode(self: decoder.Decoder, codes: pb.Codes) -> np.ndarray:
        wait()
        return decode(self, codes)

    serving: list[bool] = []
    say_ready = cli._say_ready
    cli._say_ready = lambda address, model: (serving.append(True), say_ready(address, model))  # type: ignore[assignment]
    runtimes.OnnxEncoder.encode = gated  # type: ignore[method-assign]
    decoder.Decoder.decode = gated_decode  # type: ignore[method-assign]
    server.cores = lambda: 1
    server.FLUSH_SECONDS = 0.2
    if each := os.environ.get("SECONDS_PER_IMAGE"):
        admission.BatchTime.seconds = lambda _, images, __: images * float(each)  # type: ignore[method-assign]
        decoding.Pace.seconds = lambda _, waiting, images: (waiting + images) * float(each)  # type: ignore[method-assign]
    os.environ.setdefault("MATVAE_MAX_QUEUE", "512")  # so that no test depends on how fast this machine is
    return cli.main(["--port", "0", "--max-batch", "1", "--runtime", "onnxruntime"])


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
