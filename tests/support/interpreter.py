"""Triton's interpreter without what it does again and again: for every call of a device function it looks through
`triton.language` and patches it anew, which takes longer than most functions, and which the launch has done."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any


def hasten() -> None:
    """Patch once a launch, where kernels are interpreted. Idempotent."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    if hasattr(interpreter, "hastened"):
        return
    interpreter.hastened = True
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    languages = interpreter.tl, interpreter.tl.core
    done: set[tuple[bool, ...]] = set()
    """By which of the languages a function's module knows."""
    launching: list[bool] = []

    def patch_once(function: Any) -> Any:
        known = function.__globals__.values()
        which = tuple(any(value is language for value in known) for language in languages)
        if which in done and not launching:
            return None
        launching.clear()
        done.add(which)
        return patch(function)

    def launch_anew(self: Any, *arguments: Any, **options: Any) -> None:
        done.clear()
        launching.append(True)
        launch(self, *arguments, **options)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew
