"""scHelix-Scale: atlas-scale integration of single-cell data with a dual-stream model.

The public names are loaded when first used, so that ``import schelix_scale`` is immediate.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from schelix_scale._version import __version__

if TYPE_CHECKING:
    from schelix_scale.config import Config
    from schelix_scale.config_io import load_config
    from schelix_scale.continuing import continue_run
    from schelix_scale.errors import SchelixError
    from schelix_scale.extending.api import extend
    from schelix_scale.mapping.api import Reference, map_cells
    from schelix_scale.pipeline import integrate, prepare
    from schelix_scale.run import Run
    from schelix_scale.stores import open_store

__all__ = [
    "Config",
    "Reference",
    "Run",
    "SchelixError",
    "__version__",
    "continue_run",
    "extend",
    "integrate",
    "load_config",
    "map_cells",
    "open_store",
    "prepare",
]

_HOMES = {
    "Config": "schelix_scale.config",
    "Reference": "schelix_scale.mapping.api",
    "Run": "schelix_scale.run",
    "SchelixError": "schelix_scale.errors",
    "continue_run": "schelix_scale.continuing",
    "extend": "schelix_scale.extending.api",
    "integrate": "schelix_scale.pipeline",
    "load_config": "schelix_scale.config_io",
    "map_cells": "schelix_scale.mapping.api",
    "open_store": "schelix_scale.stores",
    "prepare": "schelix_scale.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
