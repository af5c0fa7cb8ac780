"""Two sets of settings come in, what differs between them goes out, as a reader is told it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from schelix_scale.config import WATCHING, Config

_ELSEWHERE = frozenset({"max_memory", "device", "scheduler", "graph.cache_dir"})
_MAY_CHANGE = _ELSEWHERE | {f"train.{name}" for name in WATCHING}


def config_differences(a: Config | Mapping[str, Any], b: Config | Mapping[str, Any]) -> list[str]:
    """Return what differs from ``a`` to ``b``, such as ``graph.k: 30 -> 15``.

    ``max_memory``, ``device``, ``scheduler`` and how often a training is saved and where its features lie are left
    out: a run goes on with others of them. (A sketch of another size, which less memory can mean, is noticed by the
    stage that draws it.)
    """
    old, new = _flat(a), _flat(b)
    keys = [key for key in {**old, **new} if key not in _MAY_CHANGE]
    return [
        f"{key}: {_shown(old.get(key, ...))} -> {_shown(new.get(key, ...))}"
        for key in keys
        if old.get(key, ...) != new.get(key, ...)
    ]


def _flat(settings: Config | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    tree = settings.model_dump(mode="json") if isinstance(settings, Config) else settings
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _shown(value: object) -> str:
    """Write a setting as it is written in TOML, strings without quotes."""
    if value is ...:
        return "absent"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return str(value)
