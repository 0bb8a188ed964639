"""One writer at a time: a lock of the operating system, which ends with the process that holds it, even if killed."""

from __future__ import annotations

import fcntl

from flowverify.errors import InvalidInputError


def take_lock(descriptor: int, what: str) -> None:
    """Locks an open file until it is closed; forked children share the lock.

    Args:
        descriptor: of the open file.
        what: what is written to, for the message.

    Raises:
        InvalidInputError: somebody else holds the lock.
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InvalidInputError(f"{what}: another run is writing to it, expected to be the only one") from None
