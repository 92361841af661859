"""What Ray's errors mean."""

from __future__ import annotations

import ray.exceptions

from ..core.errors import TandemError, WorkerError


def cause(error: ray.exceptions.RayTaskError) -> TandemError:
    """What a remote call raised; what it did not raise on purpose, with its type."""
    raised = error.cause
    return raised if isinstance(raised, TandemError) else WorkerError(f"{type(raised).__name__}: {raised}")


def reason(error: ray.exceptions.RayActorError) -> str:
    """Why an actor died, in one line."""
    text = str(error)
    if "connection error code 2" in text:  # Ray lists what may have been
        return "its process ended without a word: killed, out of memory, or a crash that its log tells of"
    for known in ("SIGKILL", "SIGTERM", "SIGSEGV", "SIGABRT", "exit code", "OOM", "node"):
        if known in text:
            return next((line.strip() for line in text.splitlines() if known in line), text)[:300]
    return text.splitlines()[0][:300] if text else type(error).__name__
