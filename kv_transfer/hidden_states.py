"""Hidden states of prompts, written to safetensors files by a thread, never by the one that computes.

A file appears under its name when it is whole (https://huggingface.co/docs/safetensors/index, "Format"): ``token_ids``
[tokens] int64 and ``hidden_states`` [tokens, layers, hidden]. What waits for the disk is bounded: a prompt is admitted
with room for all of it, or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.bounds import FILE_SUFFIX
from ..core.config import HiddenStatesConfig
from ..core.errors import CapacityError, ConfigError, RequestError
from ..core.log import RateLimited
from ..core.messages import Generate, Prefill
from ..core.metrics import WorkerMetrics
from ..core.units import format_bytes

_PARTIAL = ".partial"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_log = RateLimited()


class _Append(NamedTuple):
    recording: Recording
    states: Tensor


class _End(NamedTuple):
    recording: Recording
    whole: bool


class Recording:
    """One prompt's hidden states on their way to a file. Made by `HiddenStateWriter.record`; belongs to one thread.

    Attributes:
        num_recorded: tokens whose states were given.
    """

    def __init__(self, writer: HiddenStateWriter, name: str, tokens: Sequence[int], num_bytes: int) -> None:
        self.name = name
        self.tokens = np.array(tokens, "<i8")
        self.num_recorded = 0
        self._writer = writer
        self._room = num_bytes
        self._open = True

    def append(self, first: int, states: Tensor) -> None:
        """Take the states of the prompt's next tokens; those that it has already are left out. Never blocks.

        Args:
            first: position of the first token; not beyond those recorded.
            states: [tokens, layers, hidden] on the CPU, of the model's type; not written to any more.
        """
        states = states[self.num_recorded - first :]
        if not self._open or not len(states):
            return
        self.num_recorded += len(states)
        self._room -= states.nbytes
        self._writer.put(_Append(self, states))
        if self.num_recorded == len(self.tokens):
            self._end(whole=True)

    def close(self) -> None:
        """Give the file up, unless all of it was given. Idempotent."""
        if self._open:
            self._end(whole=False)

    def _end(self, *, whole: bool) -> None:
        self._open = False
        self._writer.release(self._room)
        self._writer.put(_End(self, whole))


class HiddenStateWriter:
    """Writes files into one folder, from a thread of its own.

    Args:
        folder: made if it is not there; files of it that are not whole are removed.
        layers: whose outputs are written.
        hidden: numbers of a state.
        dtype: of the states.
        max_queued_bytes: of prompts that are being computed, or wait for the disk.
        on_end: called on the thread with "written", "dropped" (given up) or "failed" for each file.

    Raises:
        ConfigError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        layers: Sequence[int],
        hidden: int,
        dtype: torch.dtype,
        max_queued_bytes: int,
        on_end: Callable[[str], None],
    ) -> None:
        self.layers = tuple(layers)
        self._folder = folder
        self._hidden = hidden
        self._dtype = dtype
        self._max_queued_bytes = max_queued_bytes
        self._on_end = on_end
        self._queued_bytes = 0
        self._lock = threading.Lock()
        self._work: queue.SimpleQueue[_Append | _End | None] = queue.SimpleQueue()
        # Several workers may share the folder, also of several hosts: a file that is not whole says whose it is.
        host = f"{_PARTIAL}-{platform.node()}-"
        self._mark = f"{host}{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f".*{host}*"):
                if not _lives(left.name.rpartition("-")[2]):
                    left.unlink(missing_ok=True)
            probe = folder / f".probe{self._mark}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"hidden_states.folder: {folder}: cannot be written to: {error.strerror}",
                fix="give a folder that the workers' user may write to, with room for what is asked for",
            ) from None
        # Only the thread touches these. None: it could not be written.
        self._files: dict[int, BinaryIO | None] = {}
        self._thread: threading.Thread | None = threading.Thread(target=self._run, name="hidden-states", daemon=True)
        self._thread.start()

    @property
    def queued_bytes(self) -> int:
        """What is spoken for."""
        return self._queued_bytes

    def token_bytes(self) -> int:
        """Of one token's states."""
        return len(self.layers) * self._hidden * self._dtype.itemsize

    def record(self, name: str, tokens: Sequence[int]) -> Recording:
        """Make room for a prompt.

        Args:
            name: of the file, without its suffix: made by a gateway, letters and digits.
            tokens: of the prompt.

        Raises:
            RequestError: there can never be enough.
            CapacityError: there is not enough at present.
        """
        num_bytes = len(tokens) * self.token_bytes()
        limit = self._max_queued_bytes
        if num_bytes > limit:
            raise RequestError(
                f"the prompt's hidden states are {format_bytes(num_bytes)}, more than hidden_states.max_queued, "
                f"{format_bytes(limit)}",
                param="return_hidden_states",
            )
        with self._lock:
            if self._queued_bytes + num_bytes > limit:
                raise CapacityError(f"{format_bytes(self._queued_bytes)} of hidden states wait for the disk already")
            self._queued_bytes += num_bytes
        return Recording(self, name, tokens, num_bytes)

    def put(self, what: _Append | _End) -> None:
        """For `Recording`: queue what it has."""
        self._work.put(what)

    def release(self, num_bytes: int) -> None:
        """For `Recording`: give room back. Thread-safe."""
        with self._lock:
            self._queued_bytes -= num_bytes

    def close(self) -> None:
        """Write what is queued, and end the thread; files that are not whole are removed. Blocks. Idempotent."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                if isinstance(work, _Append):
                    self._append(work)
                else:
                    self._finish(work)
            except OSError as error:  # the request itself is unharmed
                _log.warning("hidden-states", "%s%s was not written: %s", work.recording.name, FILE_SUFFIX, error)
                self._fail(work)
        for file in self._files.values():
            if file is not None:
                _discard(file)

    def _append(self, work: _Append) -> None:
        key = id(work.recording)
        try:
            if key not in self._files:
                self._files[key] = None
                self._files[key] = self._begin(work.recording)
            file = self._files[key]
            if file is not None:
                file.write(work.states.contiguous().view(torch.uint8).numpy().data)
        finally:
            self.release(work.states.nbytes)

    def _begin(self, recording: Recording) -> BinaryIO:
        file = (self._folder / f".{recording.name}{self._mark}").open("wb")
        file.write(self._header(recording))
        file.write(recording.tokens.tobytes())
        return file

    def _header(self, recording: Recording) -> bytes:
        num_tokens = len(recording.tokens)
        ids_bytes = recording.tokens.nbytes
        header = {
            "__metadata__": {"layers": ",".join(map(str, self.layers))},
            "token_ids": {"dtype": "I64", "shape": [num_tokens], "data_offsets": [0, ids_bytes]},
            "hidden_states": {
                "dtype": _DTYPES[self._dtype],
                "shape": [num_tokens, len(self.layers), self._hidden],
                "data_offsets": [ids_bytes, ids_bytes + num_tokens * self.token_bytes()],
            },
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _finish(self, work: _End) -> None:
        key = id(work.recording)
        file = self._files.get(key)
        if file is not None and work.whole:
            file.flush()
            os.fsync(file.fileno())
            file.close()
            Path(file.name).replace(self._folder / (work.recording.name + FILE_SUFFIX))
            self._on_end("written")
        elif not work.whole:
            if file is not None:
                _discard(file)
            self._on_end("dropped")
        self._files.pop(key, None)

    def _fail(self, work: _Append | _End) -> None:
        key = id(work.recording)
        file = self._files.pop(key, None)
        if file is not None:
            _discard(file)
        if isinstance(work, _Append):
            self._files[key] = None
        self._on_end("failed")


def open_writer(
    config: HiddenStatesConfig, hidden: int, dtype: torch.dtype, metrics: WorkerMetrics
) -> HiddenStateWriter | None:
    """A worker's writer; None where nothing is to be written.

    Args:
        config: where, what, and how much at a time.
        hidden: numbers of a state.
        dtype: of the states.
        metrics: where files are counted.

    Raises:
        ConfigError: see `HiddenStateWriter`.
    """
    if config.folder is None:
        return None
    folder, ended = Path(config.folder).expanduser(), metrics.hidden_state_files
    return HiddenStateWriter(
        folder, config.layers, hidden, dtype, config.max_queued, lambda outcome: ended.labels(outcome).inc()
    )


def record(writer: HiddenStateWriter | None, request: Generate | Prefill) -> Recording | None:
    """Make room for a request's hidden states; None when it does not ask for them.

    Raises:
        RequestError: they are not to be had here, or too large.
        CapacityError: there is no room at present.
    """
    if not request.hidden_states:
        return None
    if writer is None:
        raise RequestError("this worker writes no hidden states", param="return_hidden_states")
    return writer.record(request.hidden_states, request.tokens[: request.num_prompt_tokens])


def _discard(file: BinaryIO) -> None:
    with contextlib.suppress(OSError):
        file.close()
    Path(file.name).unlink(missing_ok=True)


def _lives(pid: str) -> bool:
    return pid.isdigit() and Path(f"/proc/{pid}").exists()
