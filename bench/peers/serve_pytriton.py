"""PyTriton: NVIDIA's Triton server, the encoder in a Python process; a batch is counted in images."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import encoder
import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

# Triton's Python backend brings a libpython of its own, and finds this Python's standard library with it. Where that is
# newer, the two do not fit (3.11.7: an RLock without _recursion_count), and the model never loads. So: this Python's.
_LIBRARY = Path(sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("INSTSONAME") or "")

if __name__ == "__main__":
    if _LIBRARY.is_file() and ".so" in _LIBRARY.name:
        os.environ["LD_PRELOAD"] = str(_LIBRARY)
    model = encoder.Encoder()

    @batch
    def embed(images: np.ndarray) -> list[np.ndarray]:
        """What Triton made a batch of."""
        return [model.encode(images)]

    # Without HTTP, which would want a port of its own.
    triton = Triton(
        config=TritonConfig(allow_http=False, allow_metrics=False, grpc_address="127.0.0.1", grpc_port=encoder.port())
    )
    triton.bind(
        model_name="encoder",
        infer_func=embed,
        inputs=[Tensor(name="images", dtype=np.uint8, shape=(28, 28, 1))],
        outputs=[Tensor(name="codes", dtype=np.float32, shape=(128,))],
        config=ModelConfig(
            max_batch_size=encoder.BATCH,
            batcher=DynamicBatcher(max_queue_delay_microseconds=1000 * encoder.WAIT_MS),
        ),
    )
    triton.serve()
