"""One process at a time fills a run directory: an exclusive lock that the system drops when its process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import final

from schelix_scale.errors import RunError

LOCK_NAME = ".lock"


def open_lock(path: Path, read: bool = False) -> int:
    """Open a lock file, made if it is not there; return its descriptor.

    Whoever may write to its directory may write to it, whatever the umask of who made it.

    Parameters
    ----------
    read
        Open a file that may not be written to for reading: enough for a lock on most file systems.

    Raises
    ------
    PermissionError
        Neither is allowed.
    """
    ways = [os.O_RDWR, os.O_RDWR | os.O_CREAT, os.O_RDWR]  # sticky directories refuse O_CREAT where there is a file
    for flags in [*ways, os.O_RDONLY] if read else ways:
        with suppress(FileNotFoundError, PermissionError):
            descriptor = os.open(path, flags, 0o666)
            if os.fstat(descriptor).st_uid == os.geteuid():
                os.fchmod(descriptor, 0o600 | (path.parent.stat().st_mode & 0o066))
            return descriptor
    raise PermissionError(errno.EACCES, "permission denied", str(path))


@final
class DirectoryLock:
    """Holds the lock of ``directory`` from construction until `release` or the end of the process.

    Raises
    ------
    RunError
        Somebody else holds it, it may not be written to, or the file system has no locks.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / LOCK_NAME
        try:
            self._descriptor = open_lock(path)
        except PermissionError as error:
            raise RunError(
                f"the run {directory} is not this user's to fill ({error}). Choose another output directory with -o."
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._descriptor, 200).decode(errors="replace").strip() or "unknown"
            os.close(self._descriptor)
            if isinstance(error, BlockingIOError):
                raise RunError(
                    f"another process is filling the run {directory} ({holder}). "
                    "Wait until it has ended, or choose another output directory with -o."
                ) from error
            raise RunError(
                f"{directory} cannot be locked ({error}). Put the run on a file system that supports flock."
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def release(self) -> None:
        """Let others have the directory; the empty lock file stays, removing it would let two processes in."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
