"""The error tree.

::

    TandemError
    ├── ConfigError            a bad configuration; nothing was started
    ├── RequestError           the client's fault; fails that request alone       400
    │   ├── AuthError                                                             401
    │   ├── NotFoundError                                                         404
    │   └── TooLargeError                                                         413
    ├── CapacityError          no room now; try again later                       429 or 503
    ├── TransferError          KV did not arrive, or is not what was asked for
    ├── PlacementError         loads or numbers that no placement of experts can be made from
    ├── WorkerError            a worker died, or never started                    500
    └── IllegalTransition      a state machine was driven wrongly: a bug, with its history

Every error pickles, says what was found and what was expected, and carries in ``fix`` what to do about it.
"""

from __future__ import annotations

from typing import Any


class TandemError(Exception):
    """Base of all errors that Tandem raises on purpose.

    Attributes:
        message: one sentence: what was found, what was expected.
        fix: what the reader can do about it, or "".
        retryable: whether the same call may succeed later, unchanged.
        status: the HTTP status that a gateway answers with.
    """

    retryable = False
    status = 500

    def __init__(self, message: str, *, fix: str = "", **attributes: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix
        for name, value in attributes.items():
            setattr(self, name, value)
        self._attributes = attributes

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.fix, self._attributes)

    def __str__(self) -> str:
        return f"{self.message} ({self.fix})" if self.fix else self.message


def _rebuild(cls: type[TandemError], message: str, fix: str, attributes: dict[str, Any]) -> TandemError:
    return cls(message, fix=fix, **attributes)


class ConfigError(TandemError):
    """The configuration, the command line or the machine does not allow to start."""


class RequestError(TandemError):
    """A request that can never be served as it is. ``param`` names the offending field, or is None."""

    status = 400
    param: str | None = None


class AuthError(RequestError):
    """No API key, or a wrong one."""

    status = 401


class NotFoundError(RequestError):
    """The path, the model or the request id does not exist."""

    status = 404


class TooLargeError(RequestError):
    """The request's body is larger than the gateway accepts."""

    status = 413


class CapacityError(TandemError):
    """No room at the moment. ``retry_after_s`` is a hint for the client."""

    retryable = True
    status = 429
    retry_after_s: float = 1.0


class TransferError(TandemError):
    """KV bytes could not be moved or verified. ``reason`` is one of `core.messages.FailureReason`'s values."""

    retryable = True
    reason: str = "transport"


class PlacementError(TandemError):
    """Loads, a topology or a placement of experts that cannot be, or do not fit each other."""


class WorkerError(TandemError):
    """A worker died, never became ready, or broke in the middle of a request."""

    retryable = True


class IllegalTransition(TandemError):
    """A state machine received an event that its state does not allow. ``history`` lists what led here."""

    history: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n  ".join([super().__str__(), *self.history])
