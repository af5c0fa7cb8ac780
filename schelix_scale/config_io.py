"""Settings from outside: a TOML file and overrides come in, a checked `Config` goes out.

Nothing is guessed: an unknown key or a bad value is a `ConfigError` that names the key and where it was written.
"""

from __future__ import annotations

import json
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from schelix_scale.config import Config
from schelix_scale.errors import ConfigError

_ASSIGNMENT = "write overrides as key=value, such as genes.n_hvg=1000"


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Config:
    """Return the settings of a TOML file, changed by overrides.

    Parameters
    ----------
    path
        TOML file whose tables are the sub-models of `Config`; the defaults without one.
    overrides
        Either a mapping of dotted keys to values (``{"graph.k": 15}``; nested mappings work too), or strings
        ``"graph.k=15"``. The value of a string is TOML, or plain text; ``none`` is null; a list may be written
        ``graph.hops=0,1,3``.

    Raises
    ------
    ConfigError
        The file is missing or not TOML, a key is unknown, or a value is not allowed.
    """
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if path is not None:
        for key, value in _leaves(_read_toml(Path(path))):
            _assign(tree, key, value, f"in {path}")
            origins[key] = f"in {path}"
    for key, value in _override_items(overrides):
        _assign(tree, key, value, "in an override")
        origins[key] = "in an override"
    try:
        return Config.model_validate_json(json.dumps(tree, default=_plain), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(_complaint(problem, origins) for problem in error.errors())) from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"the settings file {path} does not exist. Check the path, or leave it out.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the settings file {path} cannot be read ({error}). It must be TOML text in UTF-8."
        ) from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        where = str(error).replace("at end of document", f"at line {len(text.splitlines())}, the end")
        raise ConfigError(f"{path} is not valid TOML: {where}. Write key = value lines under [table] lines.") from error


def _override_items(overrides: Mapping[str, Any] | Sequence[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        yield from _leaves(overrides)
        return
    if isinstance(overrides, str):
        overrides = [overrides]
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"the override {text!r} is not an assignment; {_ASSIGNMENT}.")
        key = key.strip()
        yield key, _parse_value(value.strip(), _annotations().get(key))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of nested tables under their dotted keys."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _assign(tree: dict[str, Any], key: str, value: Any, origin: str) -> None:
    known = _annotations()
    free = next((name for name in known if key.startswith(f"{name}.") and typing.get_origin(known[name]) is dict), None)
    if free is not None:  # data.tiledb: whatever comes after it, dots included, is a name of TileDB's, its value text
        text = value if isinstance(value, str) else json.dumps(value)
        _assign(tree, free, _assigned(tree, free) | {key.removeprefix(f"{free}."): text}, origin)
        return
    if key not in known:
        raise ConfigError(_unknown(key, origin, list(known)))
    *tables, leaf = key.split(".")
    for table in tables:
        tree = tree.setdefault(table, {})
    tree[leaf] = value


def _assigned(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the table that is at ``key`` so far."""
    for name in key.split("."):
        tree = tree.get(name, {})
    return dict(tree)


def _unknown(key: str, origin: str, known: list[str]) -> str:
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"{key} ({origin}) is a table, not a setting. Set one of {', '.join(inside)}."
    same_leaf = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    leaves = {name.rpartition(".")[2]: name for name in known}
    similar_leaf = [leaves[leaf] for leaf in get_close_matches(key.rpartition(".")[2], list(leaves), 2, 0.7)]
    close = list(dict.fromkeys([*same_leaf, *get_close_matches(key, known, 3, 0.6), *similar_leaf]))[:3]
    hint = f"Did you mean {' or '.join(close)}?" if close else f"The settings are: {', '.join(known)}."
    return f"unknown setting {key} ({origin}). {hint}"


def _annotations(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Return the type of every setting under its dotted key."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= _annotations(field.annotation, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = field.annotation
    return found


def _parse_value(text: str, annotation: Any) -> Any:
    """Return the value of ``key=text``, read for a setting of type ``annotation``."""
    if text == "none":
        return None
    value = _toml_value(text)
    variants = [typing.get_origin(variant) or variant for variant in (annotation, *typing.get_args(annotation))]
    if tuple in variants:
        if isinstance(value, list):
            return value
        items = [item.strip() for item in text.split(",") if item.strip()]
        return [_toml_value(item) for item in items] if int in _tuple_items(annotation) else list(map(_unquoted, items))
    if str in variants and not isinstance(value, str):
        return text  # an obs column may well be called 1 or true
    return value


def _tuple_items(annotation: Any) -> set[Any]:
    return {item for part in (annotation, *typing.get_args(annotation)) for item in typing.get_args(part)}


def _toml_value(text: str) -> Any:
    """Return ``text`` as a TOML number, truth value, string or list, or as it is."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed["value"]
    return value if len(parsed) == 1 and isinstance(value, bool | int | float | str | list) else text


def _unquoted(text: str) -> str:
    value = _toml_value(text)
    return value if isinstance(value, str) else text


def _plain(value: Any) -> Any:
    """Turn what JSON does not know (NumPy numbers, paths, dates) into what it does."""
    return value.item() if hasattr(value, "item") else str(value)


def _complaint(problem: Any, origins: Mapping[str, str]) -> str:
    places = [str(part) for part in problem["loc"]]
    key = ".".join(places)
    while places and key not in origins:
        places.pop()
        key = ".".join(places)
    key = key or ".".join(map(str, problem["loc"]))
    allowed = problem["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    if not key:  # a rule about several settings, whose message names them
        return f"{allowed}."
    return f"{key} = {problem['input']!r} ({origins.get(key, 'combined')}) is not allowed: {allowed}."


def merge_settings(config: Config | str | Path | None, batch_key: str | None, settings: Mapping[str, Any]) -> Config:
    """Combine a Config or TOML file with single settings, which win.

    Raises
    ------
    ConfigError
        A setting is unknown or has a bad value.
    """
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    if batch_key is not None:
        if overrides.get("data.batch_key", batch_key) != batch_key:
            raise ConfigError(
                f"batch_key is {batch_key!r} and data.batch_key {overrides['data.batch_key']!r}. Give one."
            )
        overrides["data.batch_key"] = batch_key
    if isinstance(config, Config):
        given = config.model_dump(exclude_unset=True)
        return load_config(None, {**flatten(given), **overrides})
    return load_config(config, overrides)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
