"""Settings of mapping: declared once, frozen, strict; from a TOML file and overrides, see ``configs/map.toml``."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schelix_scale.errors import ConfigError


class MapConfig(BaseModel):
    """How new batches are mapped and labelled; all else (genes, features, graph, model) is the reference's."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    values: Literal["auto", "counts", "linear", "log"] = Field(
        "auto", description="what the query's values are; auto decides from the data and says so"
    )
    gene_key: str | None = Field(
        None, min_length=1, description="var column of the query with the reference's gene ids; found by itself if None"
    )
    min_genes: float = Field(0.5, gt=0, le=1, description="least share of the reference's used genes to be there")
    coverage: float = Field(0.9, gt=0, lt=1, description="of label sets: how often they hold the true label")
    novelty: float = Field(
        0.01, ge=0, lt=1, description="p-value at and below which a cell is novel, its label unknown"
    )
    calibration_cells: int = Field(
        16_000, ge=100, description="held-out cells of the reference, dealt over its batches, 400 of each at least"
    )
    calibration_batches: int = Field(50, ge=2, description="held-out batches of the reference, at most")


def load_map_config(path: str | Path | None = None, overrides: Mapping[str, Any] | Sequence[str] = ()) -> MapConfig:
    """Return the settings of a TOML file changed by overrides (a mapping, or texts such as ``coverage=0.95``).

    Raises
    ------
    ConfigError
        The file is missing or not TOML, a key is unknown, or a value is not allowed.
    """
    found: dict[str, Any] = {} if path is None else _read(Path(path))
    if isinstance(overrides, Mapping):
        found |= overrides
    else:
        for text in overrides:
            key, equals, value = text.partition("=")
            if not equals:
                raise ConfigError(f"the override {text!r} is not an assignment; write it as coverage=0.95.")
            found[key.strip()] = _value(value.strip())
    for key in found:
        if key not in MapConfig.model_fields:
            near = get_close_matches(key, MapConfig.model_fields, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(MapConfig.model_fields)}."
            raise ConfigError(f"{key} is no setting of mapping. {hint} Those of the reference cannot be changed.")
    try:
        return MapConfig.model_validate_json(json.dumps(found), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise ConfigError(f"{key} = {problem['input']!r} is not allowed: {problem['msg']}.") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"the settings file {path} does not exist. Check the path, or leave it out.") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML ({error}). Write key = value lines.") from error


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
