"""How GPU kernels are written: Triton, compiled for the device at hand at their first call.

Under ``TRITON_INTERPRET=1`` the same kernels run on a CPU, in float16 and float32, for tests.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

try:
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
except ImportError:
    triton = tl = None

AVAILABLE = triton is not None
"""Whether Triton is installed; if not, nothing under `kernel` may be called."""


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function over pointers, to be launched as ``function[grid](…)``."""
    return triton.jit(function) if AVAILABLE else function


def kernel_varying(*arguments: str) -> Callable[[Callable[..., Any]], Any]:
    """`kernel` for a function with integers, or tensors' addresses, whose divisibility changes from call to call.

    For others Triton compiles another version when they are divisible by 16, or 1: a pause in the middle of serving.
    """
    return lambda function: triton.jit(function, do_not_specialize=list(arguments)) if AVAILABLE else function


@kernel
def follow(FOLLOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """First of all in a kernel that is launched with `follows`: let the next one's programs come, and wait for all that
    the kernels before have written. So a program is there, and has computed its addresses, when the last of the kernel
    before ends (programmatic dependent launch, CUDA C++ Programming Guide 4.5)."""
    if FOLLOW:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@functools.cache
def follows(device: torch.device) -> dict[str, bool]:
    """Options to launch a kernel with that begins with `follow`: on Hopper and later its programs need not wait for the
    end of the kernel before to start."""
    ready = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"FOLLOW": ready, "launch_pdl": ready}


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``: the sizes that Triton's blocks have."""
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU: how many programs it runs at a time, at least. 1 for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def shared_memory_bytes(device: torch.device) -> int:
    """Memory that the threads of one program share on a GPU, at most. 64 KiB for a CPU."""
    if device.type != "cuda":
        return 1 << 16
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])
