"""One process at a time fills a run directory: an exclusive lock that the system drops when its process ends."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import final

from schelix_scale.errors import RunError

LOCK_NAME = ".lock"


@final
class DirectoryLock:
    """Holds the lock of ``directory`` from construction until `release` or the end of the process.

    Raises
    ------
    RunError
        Somebody else holds it, or the file system has no locks.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / LOCK_NAME
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
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
