"""What can go wrong in the operator.

::

    OperatorError
    ├── ConfigError          the operator's own options: named, with the remedy
    └── ApiError             the Kubernetes API said no, or nothing
        ├── ConflictError         409 on a write: somebody else was faster, at the object or at a quota
        ├── AlreadyExistsError    409 on a create: it is there
        ├── TakenError            it is there, and is another's
        ├── NotFoundError         404
        ├── ExpiredError          410: the watch must start again with a list
        ├── RefusedError          the server's own 400, 403 or 422: quota, policy, or an object that can't be
        │   └── NotRenewedError   the Secret with the job's certificate is there, and stays as it is
        └── UnavailableError      429, 5xx, or no connection, after retries
"""

from __future__ import annotations


class OperatorError(Exception):
    """Base of all errors here."""


class ConfigError(OperatorError):
    """An option of the operator is wrong; the message names it and the remedy."""


class ApiError(OperatorError):
    """The API server's answer: HTTP code, reason and sentence."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, message


class ConflictError(ApiError):
    """The object has changed since it was read, or what had to be counted with it has."""


class AlreadyExistsError(ApiError):
    """An object of that name is there."""


class TakenError(ApiError):
    """An object of that name is there, and whoever asked for it does not own it."""


class NotFoundError(ApiError):
    """There is no such object."""


class ExpiredError(ApiError):
    """The resource version is too old to watch from."""


class RefusedError(ApiError):
    """Trying the same again at once would get the same answer."""


class NotRenewedError(RefusedError):
    """The Secret with the job's certificate is there and can't be replaced."""


class UnavailableError(ApiError):
    """The server can't answer now."""
