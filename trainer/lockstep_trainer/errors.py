"""The errors of this package, in one tree.

What a caller can act on decides the class: a ``UserError`` ends the job with a sentence, since a restart can't help; a
``StoreError`` that is ``temporary`` may be tried again; ``Corrupt`` sends a reader to the parent checkpoint; and
``Superseded`` tells a leader that it no longer leads.
"""

from __future__ import annotations

import traceback


class TrainerError(Exception):
    """Base of everything that this package raises on purpose. Its text is a sentence for people."""


class UserError(TrainerError):
    """The job's configuration or data is wrong: a restart can't help. The sentence names the field and the remedy."""


class PeerLost(TrainerError):
    """A collective failed because another worker went away. Not this worker's fault."""


class StoreError(TrainerError):
    """The object store did not do what was asked.

    ``temporary`` is True where the same call may succeed later: no connection, a server's error, throttling.
    """

    def __init__(self, message: str, *, temporary: bool = False) -> None:
        super().__init__(message)
        self.temporary = temporary


class NotFound(StoreError):
    """There is no such key."""


class PreconditionFailed(StoreError):
    """The condition of a put does not hold: the key exists, or it no longer has the expected etag (HTTP 412)."""


class Conflict(StoreError):
    """Another put to the same key was under way (HTTP 409). Read, then try again."""


class CheckpointError(TrainerError):
    """A checkpoint can't be written, read or committed."""


class Corrupt(CheckpointError):
    """Bytes of a checkpoint are missing or differ from what its manifest names."""


class NotStored(CheckpointError):
    """A file that was uploaded is not in the store, or not whole: the state can't be committed."""


class Superseded(CheckpointError):
    """``latest`` belongs to a newer term: whoever gets this must stop committing."""


class NotFenced(CheckpointError):
    """``latest`` belongs to an older term: fence before committing."""


def let_go(error: BaseException) -> None:
    """Clear the variables of the frames that ``error`` came through, and those that led to it.

    A traceback holds its frames and they what they worked on, a mapped buffer say; and frames that hold the error, a
    list of futures among their variables, wait with all that for the next collection of cycles.
    """
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
