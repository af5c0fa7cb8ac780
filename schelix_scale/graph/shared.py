"""A directory of operators that several runs share: one of them builds, the others wait and link to what it built.

An entry ``<operator id>/`` holds the operator, its diffused features and their checksums. It appears at once, complete,
and is checked before it is used; a damaged one is built again. Entries and locks are open to whoever the directory is
open to, and the content of an entry may be changed by nobody else than who made it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from schelix_scale.errors import RunError
from schelix_scale.locking import open_lock
from schelix_scale.progress import Reporter
from schelix_scale.publish import checksum, publish, write_json
from schelix_scale.records import read_json

SUMS = "checksums.json"
POLL_SECONDS = 0.5


class SharedOperators:
    """Operators by id in a directory.

    Parameters
    ----------
    directory
        Made if it is not there; on a file system with locks.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"graph.cache_dir: {directory} cannot be made ({error}). Choose another.") from error

    @contextmanager
    def claimed(self, name: str, reporter: Reporter) -> Iterator[None]:
        """Hold an id alone: wait while another process builds it.

        Raises
        ------
        RunError
            The directory may not be written to, or the file system has no locks.
        """
        try:
            descriptor = open_lock(self.directory / f"{name}.lock", read=True)
        except PermissionError as error:
            raise self._refused(error) from error
        waits = False
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not waits:
                        reporter.say(f"another process builds operator {name} in {self.directory}; waiting for it")
                    waits = True
                    time.sleep(POLL_SECONDS)
                except OSError as error:
                    raise RunError(
                        f"{self.directory} cannot be locked ({error}). Set graph.cache_dir to a directory on a file "
                        "system that supports flock."
                    ) from error
            yield
        finally:
            os.close(descriptor)

    def fetch(self, name: str, artifacts: list[Path], reporter: Reporter) -> bool:
        """Link an operator into a run, as the directories ``artifacts``; return whether it was there and intact.

        Raises
        ------
        RunError
            It may not be read.
        """
        entry = self.directory / name
        if not entry.is_dir():
            return False
        try:
            damage = self._damage(entry)
        except PermissionError as error:
            raise self._refused(error) from error
        if damage:
            reporter.warn(f"operator {name} in {self.directory} is damaged ({damage}); it is built again")
            return False
        for target in artifacts:
            with publish(target) as partial:
                shutil.copytree(entry / target.parent.name, partial, copy_function=_link)
        reporter.say(f"operator {name} was found in {self.directory}")
        return True

    def keep(self, name: str, artifacts: list[Path]) -> None:
        """Add a run's operator, the directories ``artifacts``.

        Raises
        ------
        RunError
            The directory, or a damaged entry in it, may not be written to.
        """
        try:
            with publish(self.directory / name) as partial:
                partial.mkdir()
                for source in artifacts:
                    shutil.copytree(source, partial / source.parent.name, copy_function=_link)
                sums = {source.parent.name: checksum(partial / source.parent.name) for source in artifacts}
                write_json(partial / SUMS, sums)
                _open_to(partial, self.directory.stat().st_mode)
        except PermissionError as error:
            raise self._refused(error) from error

    def _refused(self, error: PermissionError) -> RunError:
        return RunError(
            f"graph.cache_dir: {self.directory} is not open to this user ({error}). Let all its users write to it "
            "(chmod -R g+rwX for a group, and g+s), or choose another."
        )

    def _damage(self, entry: Path) -> str:
        """Say what is wrong with an entry; empty if nothing is."""
        try:
            sums = read_json(entry / SUMS)
        except RunError as error:
            return str(error)
        if set(sums) != {"graph", "diffused"} or not all((entry / part).is_dir() for part in sums):
            return "a part is missing"
        wrong = [part for part, expected in sums.items() if checksum(entry / part) != expected]
        return f"{', '.join(wrong)}: other content than was written" if wrong else ""


def _open_to(tree: Path, mode: int) -> None:
    """Let whoever may read a directory of this ``mode`` read a tree in it, and who may write there remove the tree."""
    for path in (tree, *tree.rglob("*")):
        found = stat.S_IMODE(path.stat().st_mode)
        access = found | (mode & 0o077) if path.is_dir() else (found & ~0o022) | (mode & 0o044)
        with suppress(PermissionError):  # of a file that another user made, and opened
            path.chmod(access)


def _link(source: str, target: str) -> None:
    """Give a file a second name, or copy it where that cannot be. Published files are never changed in place."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
