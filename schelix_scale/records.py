"""What is written about a run: its header (``run.json``) and its stage records (``stages/<name>.json``)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schelix_scale.config import Config
from schelix_scale.config_changes import config_differences
from schelix_scale.errors import RunError
from schelix_scale.locking import LOCK_NAME
from schelix_scale.publish import checksum, partial_path, remove, size_of

FORMAT = 1
START = "start.pt"  # the weights from which a finished run is trained on
LATER = ("graph", "train", "embed")
AGAIN = "Run the same `schelix integrate` command again"


def again(source: Mapping[str, Any]) -> str:
    """Return what to do about a run of these cells, by the verb that makes it."""
    verb = "map" if "mapped_onto" in source else "extend" if "extends" in source else "integrate"
    return f"Run the same `schelix {verb}` command again"


def unfinished(root: Path, source: Mapping[str, Any]) -> str:
    """Return that a run is not finished, and what to do: one that is being trained on is not made again."""
    advice = again(source)
    done = set(recorded_stages(root))
    due = next((stage for stage in LATER if stage not in done), LATER[-1])
    if "integrate" in advice and {"genes", "features"} <= done:
        advice += f", or `schelix {due} {root}` if it was made or changed stage by stage,"
    if (root / START).exists():
        advice = f"Run `schelix embed {root}`, after `schelix train {root} --continue` if that was interrupted,"
    return f"the run {root} is not finished: it has no manifest.json. {advice} to finish it."


@dataclass(frozen=True)
class Artifact:
    """A published file or directory: its path in the run, size in bytes, number of files and sha256."""

    path: str
    bytes: int
    files: int
    sha256: str

    @classmethod
    def measure(cls, run: Path, relative: str) -> Artifact:
        """Return the artifact as it is now."""
        return cls(relative, *size_of(run / relative), checksum(run / relative))

    def misfit(self, run: Path) -> str | None:
        """Return how existence or size differ from what was recorded, None if they do not."""
        path = run / self.path
        if not path.exists():
            return "is missing"
        n_bytes, n_files = size_of(path)
        if (n_bytes, n_files) != (self.bytes, self.files):
            return f"has {n_bytes} bytes in {n_files} files instead of {self.bytes} in {self.files}"
        return None

    def damage(self, run: Path) -> str | None:
        """Return how it differs from what was recorded, its checksum included; reads every byte."""
        misfit = self.misfit(run)
        if misfit is None and checksum(run / self.path) != self.sha256:
            return "has another checksum than when it was made"
        return misfit


@dataclass(frozen=True)
class StageRecord:
    """What a finished stage made, from which inputs (``fingerprint``), and how long it took."""

    stage: str
    fingerprint: str
    artifacts: tuple[Artifact, ...]
    seconds: float
    details: dict[str, Any]
    finished: str

    @classmethod
    def read(cls, path: Path) -> StageRecord:
        """Read a record.

        Raises
        ------
        RunError
            It is damaged.
        """
        content = read_json(path)
        try:
            artifacts = tuple(Artifact(**artifact) for artifact in content.pop("artifacts"))
            return cls(artifacts=artifacts, **content)
        except (KeyError, TypeError) as error:
            raise RunError(f"{path} is not a stage record ({error}). Delete it. {AGAIN}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or raise a `RunError` that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged or cannot be read ({error}). Delete it. {AGAIN}.") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: it holds no JSON object. Delete it. {AGAIN}.")
    return content


def read_header(run: Path) -> dict[str, Any]:
    """Read run.json.

    Raises
    ------
    RunError
        It is damaged, not from scHelix-Scale, or of another format.
    """
    path = run / "run.json"
    remedy = "Choose another output directory with -o; nothing here was changed."
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        if not {"format", "schelix_version", "config", "source"} <= set(header):
            raise ValueError("it has no format, schelix_version, config and source")
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged or not from schelix ({error}). {remedy}") from error
    if header["format"] != FORMAT:
        raise RunError(f"{path} has format {header['format']}, this version of schelix reads {FORMAT}. {remedy}")
    return dict(header)


def recorded_stages(run: Path) -> list[str]:
    """Return the names of the stages that have a record, damaged or not."""
    return sorted(path.stem for path in (run / "stages").glob("*.json") if "." not in path.stem)


def refuse_foreign(path: Path) -> None:
    """Raise a `RunError` if ``path`` exists and is neither a run nor an empty directory."""
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file, not a directory. Choose another output directory with -o.")
    if not path.exists() or (path / "run.json").exists():
        return
    ours = {LOCK_NAME, partial_path(path / "run.json").name}  # all that an interrupted start can leave
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in ours)
    if others:
        raise RunError(
            f"{path} is not a run (no run.json) and not empty: it has {', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}. Choose another output directory with -o; nothing here was changed."
        )


def refuse_mapped(path: Path, source: Mapping[str, Any]) -> None:
    """Raise a `RunError` if a directory holds cells mapped onto a run: nothing is trained there, or copied from it."""
    if "mapped_onto" in source:
        raise RunError(
            f"{path} holds cells mapped onto {source['mapped_onto']['path']}, not a run. What was found of them is in "
            f"{path / 'mapped.zarr'} (anndata.read_zarr); to make a run of both, extend that run (schelix extend)."
        )


def refuse_other(path: Path, header: Mapping[str, Any], config: Config, source: Mapping[str, Any]) -> None:
    """Raise a `RunError` if the run of ``header`` was started with other settings or cells."""
    changes = config_differences(header["config"], config)
    if header["source"].get("fingerprint") != source.get("fingerprint"):
        changes += _source_changes(header["source"], source)
    if changes:
        raise RunError(
            f"{path} holds a run with other settings or cells ({'; '.join(changes)}). "
            "Choose another output directory with -o, or replace that run with --overwrite."
        )


def _source_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what says to a reader how two sources differ: no fingerprints, no lists of all parts."""
    told = [
        f"source.{change}"
        for change in config_differences(before, now)
        if not change.partition(": ")[0].endswith("fingerprint") and not re.search(r"(: |-> )\[", change)
    ]
    onto = [source.get("mapped_onto", {}).get("fingerprint") for source in (before, now)]
    if onto[0] != onto[1]:
        told.append("the reference was changed since")
    return told or ["source: other cells or batches, or what is read of them"]


def clear(run: Path) -> None:
    """Remove the content of a run; run.json goes last, by replacement, so that an interruption leaves a run of ours."""
    kept = {"run.json", LOCK_NAME}
    for first in ("manifest.json", "stages"):
        remove(run / first)
    for entry in run.iterdir():
        if entry.name not in kept:
            remove(entry)
