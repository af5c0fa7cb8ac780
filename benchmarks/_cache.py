"""Results kept by content: what was computed from the same data by the same code is read instead of computed again.

A kept run has its embeddings, what it cost and where it ran. A kept score has its metrics. Both are found by the hash
of everything they depend on, so nothing has to be declared out of date; deleting the directory is always safe.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from _code import code_digest
from _machine import threads, versions_of
from _methods import COMMON, method_of
from _tasks import Outcome, Task, TaskFailed, run_task

_FORMAT = 1


def default_directory() -> Path:
    """Return ``$SCHELIX_BENCHMARK_CACHE``, else ``schelix-benchmark`` in the user's cache directory."""
    if given := os.environ.get("SCHELIX_BENCHMARK_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "schelix-benchmark"


class Cache:
    """A directory of runs and scores.

    Parameters
    ----------
    directory
        Where to keep them; None keeps and finds nothing.
    again
        Methods that are run even when kept, for instance to measure them when nothing else runs; what they make
        replaces what was kept.
    """

    def __init__(self, directory: Path | None, again: Iterable[str] = ()) -> None:
        self._directory = directory
        self._again = frozenset(again)
        self._digests: dict[tuple[str, int, int], str] = {}

    def run(self, task: Task, scratch: Path) -> Outcome:
        """Return what a task makes: as kept, or by running it in ``scratch``.

        Raises
        ------
        TaskFailed
            The method failed, or the data or code changed while it ran, so that nobody knows what it is a result of;
            nothing is kept.
        """
        if self._directory is None:
            return run_task(task, scratch)
        what = self.identity(task)
        entry = self._directory / "runs" / _key(what)
        if task.method not in self._again and (found := _complete(entry)) is not None:
            embeddings = {name: str(entry / file) for name, file in found["embeddings"].items()}
            return Outcome(**{**found, "settings": tuple(found["settings"]), "embeddings": embeddings, "kept": True})
        outcome = run_task(task, scratch)
        if self.identity(task) != what:
            raise TaskFailed(f"data or code changed while {task.method} ran on {task.data}. Run it again")
        files = {name: f"{i}.npy" for i, name in enumerate(outcome.embeddings)}
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{entry.name}.partial-", dir=entry.parent))
        try:
            for name, file in files.items():
                shutil.copyfile(outcome.embeddings[name], partial / file)
            facts = asdict(replace(outcome, embeddings=files))
            del facts["kept"]
            _write(partial / "identity.json", what)
            _write(partial / "facts.json", facts)
            if task.method in self._again or _complete(entry) is None:
                shutil.rmtree(entry, ignore_errors=True)
            try:
                partial.rename(entry)
            except OSError:
                if _read(entry / "facts.json") is None:  # else another process has kept the same meanwhile
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return replace(outcome, embeddings={name: str(entry / file) for name, file in files.items()})

    def identity(self, task: Task) -> dict[str, Any]:
        """Return everything that the embeddings of a task depend on."""
        method = method_of(task.method)
        return {
            "format": _FORMAT,
            "data": self.digest(task.data),
            "batch_key": task.batch_key,
            "label_key": task.label_key if method.sees_labels else None,
            "method": task.method,
            "seed": task.seed,
            "settings": list(task.settings),
            "python": ".".join(platform.python_version_tuple()[:2]),
            "versions": versions_of([*COMMON, *method.libraries]),
            "code": code_digest(method.run),
            **({"threads": threads()} if task.method.startswith("schelix") else {}),  # which decide the last bits
        }

    def scores(
        self, what: Mapping[str, Any], files: Sequence[str], compute: Callable[[Sequence[str]], Sequence[Any]]
    ) -> list[Any]:
        """Return the scores of embedding files: as kept, else by one call of ``compute`` for those that are missing.

        Parameters
        ----------
        what
            Everything that scores depend on beside the embedding.
        """
        if self._directory is None:
            return list(compute(files)) if files else []
        identities = [{"format": _FORMAT, **what, "embedding": self.digest(file)} for file in files]
        paths = [self._directory / "scores" / f"{_key(identity)}.json" for identity in identities]
        found = [_read(path) for path in paths]
        missing = [i for i, kept in enumerate(found) if kept is None]
        computed = compute([files[i] for i in missing]) if missing else []
        for i, scores in zip(missing, computed, strict=True):
            found[i] = {"identity": identities[i], "scores": scores}
            paths[i].parent.mkdir(parents=True, exist_ok=True)
            _write(paths[i], found[i])
        return [kept["scores"] for kept in found if kept is not None]

    def digest(self, file: str) -> str:
        """Return the SHA-256 of a file's content; a file is read again only when its size or time changed."""
        status = Path(file).stat()
        seen = (str(Path(file).resolve()), status.st_size, status.st_mtime_ns)
        if seen not in self._digests:
            with Path(file).open("rb") as stream:
                self._digests[seen] = hashlib.file_digest(stream, "sha256").hexdigest()
        return self._digests[seen]


def _complete(entry: Path) -> Any:
    """Return the facts of a kept run; None when there is none, or an embedding of it was deleted."""
    facts = _read(entry / "facts.json")
    return facts if facts and all((entry / file).exists() for file in facts["embeddings"].values()) else None


def _key(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _read(path: Path) -> Any:
    """Return what a JSON file says; None when there is none, or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(path: Path, value: Any) -> None:
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
