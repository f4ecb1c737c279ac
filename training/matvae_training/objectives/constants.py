"""Numbers that every step needs again, on the device.

`torch.tensor` copies from ordinary memory, and the CPU waits for such a copy until a GPU has done all that was asked of
it before; so each is copied once. A compiled step has them in its graph.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The values as a tensor (n,) there, which nobody may change."""
    if torch.compiler.is_compiling():
        return torch.tensor(values, device=device, dtype=dtype)
    return _kept(values, device, dtype)


@functools.lru_cache(maxsize=256)
def _kept(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # wherever it is asked for first, training may ask for it next
        return torch.tensor(values, device=device, dtype=dtype)
