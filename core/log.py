"""Logs: one line a record, with the process and, wherever there is one, the request id."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

logger = logging.getLogger("tandem")

_MAX_SUPPRESSED_KEYS = 1024


class RequestLog(logging.LoggerAdapter[logging.Logger]):
    """A logger whose every line names one request."""

    def __init__(self, request_id: str) -> None:
        super().__init__(logger, {"request_id": request_id})

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = self.extra
        return msg, kwargs


class RateLimited:
    """At most one record a ``period_s`` for each key; the next one says how many were held back."""

    def __init__(self, period_s: float = 5.0) -> None:
        self._period_s = period_s
        self._lock = threading.Lock()
        self._last: dict[str, tuple[float, int]] = {}

    def warning(self, key: str, message: str, *args: object) -> None:
        """Log ``message % args`` as a warning, or count it."""
        with self._lock:
            now = time.monotonic()
            last_s, held_back = self._last.get(key, (-self._period_s, 0))
            if now - last_s < self._period_s:
                self._last[key] = (last_s, held_back + 1)
                return
            if len(self._last) >= _MAX_SUPPRESSED_KEYS:
                self._last.clear()
            self._last[key] = (now, 0)
        more = f" (and {held_back} more like it)" if held_back else ""
        logger.warning(message + more, *args, stacklevel=2)


class _TextFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        request = getattr(record, "request_id", "")
        parts = [f"{stamp}.{int(record.msecs):03d}", record.levelname, self._process, request, record.getMessage()]
        if held_back := getattr(record, "held_back", 0):
            parts.append(f"(and {held_back} more like it)")
        line = " ".join(part for part in parts if part)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "at_s": round(record.created, 6),
            "level": record.levelname,
            "process": self._process,
            "message": record.getMessage(),
        }
        if request := getattr(record, "request_id", ""):
            fields["request_id"] = request
        if held_back := getattr(record, "held_back", 0):
            fields["held_back"] = held_back
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class _Limit(logging.Filter):
    """Lets each cause, a line of the code, write so many records a second; the next that is let through says how many
    were held back."""

    def __init__(self, max_per_s: int) -> None:
        super().__init__()
        self._max_per_s = max_per_s
        self._lock = threading.Lock()
        self._causes: dict[tuple[str, int], list[float]] = {}
        """Second, records in it, records held back since the last that was let through."""

    def filter(self, record: logging.LogRecord) -> bool:
        with self._lock:
            cause = self._causes.setdefault((record.pathname, record.lineno), [0.0, 0, 0])
            second = record.created // 1
            if second != cause[0]:
                cause[0], cause[1] = second, 0
            if cause[1] >= self._max_per_s:
                cause[2] += 1
                return False
            cause[1] += 1
            if cause[2]:
                record.held_back, cause[2] = int(cause[2]), 0
            return True


def configure_logging(process: str, level: str, style: str, file: Path | None = None, max_per_s: int = 0) -> None:
    """Send this process's records to ``file`` (created), or to standard error.

    Args:
        process: the name in every line, "decode-0#1".
        level: least severity.
        style: "text" or "json".
        file: where to append, or None for standard error.
        max_per_s: records that one line of the code may write in a second; 0: any number.
    """
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(file)
    if max_per_s:
        handler.addFilter(_Limit(max_per_s))
    handler.setFormatter(_JsonFormatter(process) if style == "json" else _TextFormatter(process))
    for old in logger.handlers:
        old.close()
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
