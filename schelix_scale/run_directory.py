"""The run directory: settings in, recorded stages out, and a manifest written last.

``run.json`` is first, ``stages/<name>.json`` comes after the artifacts of a stage, ``manifest.json`` when all are done.
A reader trusts only the manifest; whatever was interrupted is done again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, final

from schelix_scale import publish as files
from schelix_scale._version import __version__
from schelix_scale.config import Config
from schelix_scale.errors import RunError
from schelix_scale.locking import DirectoryLock
from schelix_scale.provenance import provenance
from schelix_scale.records import (
    FORMAT,
    Artifact,
    StageRecord,
    again,
    clear,
    read_header,
    read_json,
    recorded_stages,
    refuse_foreign,
    refuse_other,
    unfinished,
)


@final
class RunDirectory:
    """A directory that the stages fill; made by `claim` (to write) or `open` (to read). Close it to release it."""

    def __init__(self, path: Path, config: Config, source: dict[str, Any], lock: DirectoryLock | None) -> None:
        self.path, self.config, self.source, self._lock = path, config, source, lock

    @classmethod
    def claim(cls, path: str | Path, config: Config, source: Mapping[str, Any], overwrite: bool = False) -> Self:
        """Start a run in ``path``, or resume the one that is there with the same settings and cells.

        The same cells may be described otherwise, as at another path: the run then says where they are now.
        A run of other settings in which no stage was finished is started anew: nothing of it would be lost.

        Parameters
        ----------
        path
            The directory, ``~`` included; made if it is not there.
        config
            Settings of the run.
        source
            JSON-able description of the cells, with ``uri``, ``layer`` and ``fingerprint``.
        overwrite
            Remove the run that is there. A directory that is not a run is never touched.

        Raises
        ------
        RunError
            The directory is something else, holds stages of other settings, or another process is filling it.
        """
        root = _expanded(path)
        refuse_foreign(root)
        try:
            with files.disk_errors(root / "run.json"):
                root.mkdir(parents=True, exist_ok=True)
                lock = DirectoryLock(root)
        except OSError as error:
            raise RunError(f"{root} cannot be written ({error}). Choose another output directory with -o.") from error
        try:
            refuse_foreign(root)
            if (root / "run.json").exists():
                there = read_header(root)
                if overwrite:
                    clear(root)
                elif recorded_stages(root) or (root / "manifest.json").exists():
                    refuse_other(root, there, config, source)
            header = {"format": FORMAT, "schelix_version": __version__, "config": config, "source": dict(source)}
            files.write_json(root / "run.json", header)
            _tell_manifest(root, source)
        except BaseException:
            lock.release()
            raise
        return cls(root, config, dict(source), lock)

    @classmethod
    def open(cls, path: str | Path, finished: bool = False, writable: bool = False) -> Self:
        """Open a run under its own settings; ``finished`` asks for a manifest, ``writable`` takes the lock.

        Raises
        ------
        RunError
            ``path`` is not a run, is not finished, is of another version, or another process is filling it.
        """
        root = _expanded(path)
        if not (root / "run.json").is_file():
            raise RunError(f"{root} is not a run: it has no run.json. Give the directory that -o named.")
        header = read_header(root)
        if finished and not (root / "manifest.json").is_file():
            raise RunError(unfinished(root, header["source"]))
        try:
            config = Config.model_validate(header["config"])
        except ValueError as error:
            raise RunError(
                f"the settings in {root / 'run.json'} are of schelix {header['schelix_version']} and unknown to "
                f"{__version__} ({error}). Install that version, or integrate again with --overwrite."
            ) from error
        return cls(root, config, header["source"], DirectoryLock(root) if writable else None)

    def configure(self, config: Config) -> None:
        """Go on with other settings; stages whose inputs they change are done again."""
        self._writable()
        header = {"format": FORMAT, "schelix_version": __version__, "config": config, "source": self.source}
        files.write_json(self.path / "run.json", header)
        self.config = config

    def close(self) -> None:
        """Release the lock, so that another process may fill the run."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        """Return the run directory."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Release the lock."""
        self.close()

    def fingerprint(self, stage: str, version: int, inputs: Mapping[str, Any], after: Sequence[str] = ()) -> str:
        """Return the sha256 of a stage's code ``version``, its inputs, and what the stages it comes ``after`` made.

        A predecessor counts with its own fingerprint and the checksums of its artifacts, so that a stage is done
        again when what it read is rebuilt differently.

        Raises
        ------
        RunError
            A stage of ``after`` is not recorded.
        """
        made = [
            [record.fingerprint, sorted((artifact.path, artifact.sha256) for artifact in record.artifacts)]
            for record in map(self.record, after)
        ]
        content = [stage, version, inputs, made]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), default=files.jsonable)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def is_done(self, stage: str, fingerprint: str) -> bool:
        """Return whether the stage is recorded with this fingerprint and its artifacts are as they were made."""
        return self.was_done(stage, fingerprint) and not self.damage(stage)

    def was_done(self, stage: str, fingerprint: str) -> bool:
        """Return whether the stage is recorded with this fingerprint; its artifacts are not looked at."""
        try:
            return self.record(stage).fingerprint == fingerprint
        except RunError:
            return False

    def damage(self, stage: str) -> list[str]:
        """Return how artifacts of a recorded stage differ from what was made; reads all of them."""
        found = [(artifact.path, artifact.damage(self.path)) for artifact in self.record(stage).artifacts]
        return [f"{self.path / path} {how}" for path, how in found if how is not None]

    def begin(self, stage: str) -> None:
        """Start a stage (again): the run is unfinished from here, and what an interruption has left is removed."""
        self._writable()
        for stale in (self.path / "manifest.json", self._record_path(stage)):
            if stale.exists():
                stale.unlink()
                files.sync(stale.parent)
        files.remove_partials(self.path)

    def publish(self, relative: str) -> AbstractContextManager[Path]:
        """Return a context that yields a ``.partial`` path to write to, and renames it to ``relative`` at the end."""
        self._writable()
        return files.publish(self._inside(relative))

    def finish(
        self,
        stage: str,
        fingerprint: str,
        artifacts: Sequence[str],
        seconds: float,
        details: Mapping[str, Any] | None = None,
    ) -> StageRecord:
        """Record the stage with the sizes and checksums of its published artifacts (paths in the run)."""
        self._writable()
        for name in artifacts:
            if not self._inside(name).exists():
                raise RunError(f"stage {stage} made no {name} in {self.path}; publish it before the stage is finished.")
        measured = tuple(Artifact.measure(self.path, name) for name in artifacts)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = StageRecord(stage, fingerprint, measured, round(seconds, 3), dict(details or {}), now)
        files.write_json(self._record_path(stage), asdict(record))
        return record

    def record(self, stage: str) -> StageRecord:
        """Return what `finish` recorded.

        Raises
        ------
        RunError
            The stage is not recorded, or its record is damaged.
        """
        path = self._record_path(stage)
        if not path.is_file():
            raise RunError(f"the run {self.path} has no finished stage {stage!r}. {self.again} to finish it.")
        return StageRecord.read(path)

    def records(self) -> list[StageRecord]:
        """Return the records of all finished stages, in the order in which they finished."""
        return sorted((self.record(stage) for stage in recorded_stages(self.path)), key=lambda record: record.finished)

    def invalidate(self, stage: str) -> None:
        """Forget that a stage is done, so that it is done again."""
        self.begin(stage)

    def finish_run(self, summary: Mapping[str, Any]) -> None:
        """Write the manifest: from here on the run can be read."""
        self._writable()
        manifest = {
            "format": FORMAT,
            **provenance(self.config.threads),
            "config": self.config,
            "source": self.source,
            "stages": {record.stage: asdict(record) for record in self.records()},
            "summary": dict(summary),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        files.write_json(self.path / "manifest.json", manifest)

    @property
    def again(self) -> str:
        """The advice to run the command that makes this directory again."""
        return again(self.source)

    def verify(self) -> list[str]:
        """Return the problems of the run, each with its remedy: unfinished, artifacts missing, cut or changed."""
        problems: list[str] = []
        listed: dict[str, Any] | None = None
        if not (self.path / "manifest.json").is_file():
            problems.append(unfinished(self.path, self.source))
        else:
            try:
                listed = dict(read_json(self.path / "manifest.json")["stages"])
            except (RunError, KeyError, TypeError) as error:
                problems.append(f"{self.path / 'manifest.json'} is damaged ({error}). Delete it. {self.again}.")
        for stage in {**dict.fromkeys(listed or ()), **dict.fromkeys(recorded_stages(self.path))}:
            problems += self._verify_stage(stage, listed)
        return problems

    def _verify_stage(self, stage: str, listed: Mapping[str, Any] | None) -> list[str]:
        try:
            path, record = self._record_path(stage), self.record(stage)
        except (RunError, ValueError) as error:
            return [str(error)]
        problems = []
        if listed is not None and read_json(path) != listed.get(stage):
            problems.append(f"{path} differs from the manifest. Delete it. {self.again} to do stage {stage} again.")
        for artifact in record.artifacts:
            damage = artifact.damage(self.path)
            if damage:
                where = self.path / artifact.path
                remedy = f"Delete it. {self.again}" if where.exists() else self.again
                problems.append(f"{where} (made by stage {stage}) {damage}. {remedy} to rebuild it.")
        return problems

    def _record_path(self, stage: str) -> Path:
        if not re.fullmatch(r"[a-z0-9_-]+", stage):
            raise ValueError(f"{stage!r} cannot name a stage; use lower-case letters, digits, _ and -.")
        return self.path / "stages" / f"{stage}.json"

    def _inside(self, relative: str) -> Path:
        if Path(relative).is_absolute() or ".." in Path(relative).parts:
            raise ValueError(f"{relative!r} is not inside the run; give a path relative to {self.path}.")
        return self.path / relative

    def _writable(self) -> None:
        if self._lock is None:
            raise RunError(f"the run {self.path} is open for reading. Open it with claim, or with writable=True.")


def _tell_manifest(root: Path, source: Mapping[str, Any]) -> None:
    """Write the description of the cells into the manifest of a finished run if it has another one."""
    path, described = root / "manifest.json", json.loads(json.dumps(source, default=files.jsonable))
    if path.exists() and (manifest := read_json(path)).get("source") != described:
        files.write_json(path, {**manifest, "source": described})


def _expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise RunError(f"{path} names a home directory that is not known ({error}). Write the path in full.") from error
