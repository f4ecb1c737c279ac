"""What differs on a GPU, and what `torch.compile` adds: all of it is here.

A model and every image of the data set live on the device; an order of the images is drawn on the CPU, as without one,
so that a batch is an index there, too. Losses are looked at every so many steps, because each look waits for the GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from matvae_training.config import FitError
from matvae_training.objectives.composition import Terms

LOOK_EVERY = 32
"""Steps between two looks at the loss on a GPU; on a CPU every step is looked at, which costs nothing there."""

_NEEDS = {
    "cpu": "on a CPU it needs a C++ compiler",
    "cuda": "on a GPU it needs Triton, a C compiler and the headers of Python",
}


def find(name: str) -> torch.device:
    """The device `cpu` or `cuda`, ready. Raises FitError: there is none."""
    if name == "cuda":
        if not torch.cuda.is_available():
            raise FitError("this machine has no GPU that torch can use: take --device cpu")
        # fp32 means fp32. By `allow_tf32`, as in the server: torch.export refuses the newer settings.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True  # batches have one shape
    return torch.device(name)


def of(module: Any) -> torch.device:
    """Where the weights of a torch module are; the CPU where it has none."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def name(device: str) -> str:
    """Of the GPU, where `device` is one that can be used; else empty."""
    return torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else ""


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are made of single numbers there, which takes many times as long as float32.

    On a CPU they are fast where oneDNN has vectors for them: AVX-512, AMX, or Arm's own.
    """
    if device.type != "cpu":
        return False
    usable = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return not (usable and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compiled(compute: Callable[..., Terms], device: torch.device) -> Callable[..., Terms]:
    """`compute`, fused by `torch.compile`; on a GPU as CUDA graphs, whose kernels are launched as one.

    The shapes of its arguments must stay as they are. What it returns on a GPU is good until it is called again. It
    raises FitError at its first call where nothing can be compiled; the way back is compiled when it is first taken,
    for which there is `compiling`.
    """
    # What a model before this one left would count against a limit, beyond which nothing is compiled, without a word.
    torch._dynamo.reset()
    inner = torch.compile(compute, mode="reduce-overhead" if device.type == "cuda" else "default", dynamic=False)

    def call(*arguments: Any, **named: Any) -> Terms:
        if device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with compiling(device):
            return inner(*arguments, **named)

    return call


@contextlib.contextmanager
def compiling(device: torch.device) -> Iterator[None]:
    """In it, what `torch.compile` fails at is a FitError that says what it needs there."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        why = str(error).strip().partition("\n")[0]
        raise FitError(
            f"torch.compile failed ({type(error).__name__}: {why}): {_NEEDS[device.type]}, and a cache that no kill "
            "has cut short (TORCHINDUCTOR_CACHE_DIR names another); or train without --compile"
        ) from error


def wait(device: torch.device) -> None:
    """Until all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of all random numbers that training draws."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Go back to that state, or to as much of it as there is: one of a CPU says nothing of a GPU."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
