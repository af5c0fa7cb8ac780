"""The exception tree. Every message says what was asked, what was found and the remedy."""

from __future__ import annotations


class SchelixError(Exception):
    """Base class of every error that scHelix-Scale raises on purpose."""


class ConfigError(SchelixError):
    """A setting is unknown, has a bad value or contradicts another one."""


class StoreError(SchelixError):
    """A source of cells cannot be opened or read: missing, damaged or of another format."""


class DataError(SchelixError):
    """The cells can be read, but their content cannot be integrated (values, names, batches)."""


class RunError(SchelixError):
    """A run directory cannot be used: another configuration, damaged, unfinished or not a run."""


class GraphError(SchelixError):
    """A neighbour graph cannot be built to the asked recall."""


class TrainingError(SchelixError):
    """Training cannot start or has diverged."""


class RankLost(TrainingError):
    """Another rank of this training has ended, and has said why if it could; the main rank alone reports it."""
