"""Runs and scores are found again by content, and only then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _cache import Cache, default_directory
from _code import digest_of
from _tasks import Task, TaskFailed

from tests.benchmarks.data import made_up


@pytest.fixture
def task(tmp_path: Path) -> Task:
    made_up(tmp_path / "cells.h5ad")
    return Task(str(tmp_path / "cells.h5ad"), "batch", "pca")


def test_a_run_is_read_again_until_one_byte_of_the_data_changes(task: Task, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    first = cache.run(task, tmp_path / "first")
    again = Cache(tmp_path / "cache").run(task, tmp_path / "again")
    assert (first.kept, again.kept) == (False, True)
    assert not (tmp_path / "again").exists()
    assert again == replace(first, kept=True)
    assert np.load(again.embeddings["pca"]).shape == (240, 50)
    assert Path(again.embeddings["pca"]).is_relative_to(tmp_path / "cache")
    assert again.conditions["threads"] >= 1

    known = cache.identity(task)
    with Path(task.data).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    changed = Cache(tmp_path / "cache").identity(task)
    assert {key for key in known if known[key] != changed[key]} == {"data"}

    copy = tmp_path / "elsewhere" / "renamed.h5ad"
    copy.parent.mkdir()
    made_up(copy)
    assert cache.run(replace(task, data=str(copy)), tmp_path / "copy").kept


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"batch_key": "lab"}, {"batch_key"}),
        ({"seed": 1}, {"seed"}),
        ({"settings": ("graph.k=9",)}, {"settings"}),
        ({"label_key": "kind"}, set()),
        ({"method": "harmony"}, {"method", "code", "versions"}),
        ({"method": "schelix@no-gate"}, {"method", "code", "versions"}),
    ],
)
def test_what_makes_another_run(task: Task, change: dict[str, object], differs: set[str]) -> None:
    cache = Cache(None)
    one, other = cache.identity(task), cache.identity(replace(task, **change))
    assert {key for key in one if one[key] != other[key]} - {"versions"} == differs - {"versions"}


def test_labels_make_another_run_of_a_method_that_sees_them(task: Task) -> None:
    cache = Cache(None)
    told = replace(task, method="scanvi")
    assert cache.identity(told)["label_key"] == "cell_type"
    assert cache.identity(task)["label_key"] is None


def test_failures_are_not_kept_and_without_a_directory_nothing_is(task: Task, tmp_path: Path) -> None:
    with pytest.raises(TaskFailed, match="KeyError"):
        Cache(tmp_path / "cache").run(replace(task, batch_key="lab"), tmp_path / "failed")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert Cache(None).scores({}, [], lambda files: []) == []


def test_only_missing_scores_are_computed(tmp_path: Path) -> None:
    files = []
    for name, content in [("a", b"1"), ("b", b"2"), ("c", b"1")]:
        (tmp_path / name).write_bytes(content)
        files.append(str(tmp_path / name))
    asked: list[list[str]] = []

    def count(new: Sequence[str]) -> list[dict[str, int]]:
        asked.append([Path(file).name for file in new])
        return [{"size": int(Path(file).read_bytes())} for file in new]

    cache = Cache(tmp_path / "cache")
    assert cache.scores({"metric": 1}, files[:1], count) == [{"size": 1}]
    assert cache.scores({"metric": 1}, files, count) == [{"size": 1}, {"size": 2}, {"size": 1}]
    assert cache.scores({"metric": 2}, files[:1], count) == [{"size": 1}]
    for path in (tmp_path / "cache" / "scores").iterdir():
        path.write_text("{")  # damaged: as if there were none
    assert cache.scores({"metric": 2}, files[:1], count) == [{"size": 1}]
    assert asked == [["a"], ["b"], ["a"], ["a"]]


def test_the_directory_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SCHELIX_BENCHMARK_CACHE", raising=False)
    assert default_directory() == tmp_path / "schelix-benchmark"
    monkeypatch.setenv("SCHELIX_BENCHMARK_CACHE", str(tmp_path / "own"))
    assert default_directory() == tmp_path / "own"


METHOD = '''"""Module."""
from helper import scaled
from schelix_scale.errors import SchelixError
LIMIT = 3
OTHER = 4

def method(task: Task) -> int:
    """Do it."""
    return scaled(LIMIT)

def unrelated():
    return OTHER
'''
HELPER = "FACTOR = 2\n\ndef scaled(x):\n    return x * FACTOR\n\ndef unused():\n    return 1\n"


@pytest.mark.parametrize(
    ("file", "old", "new", "same"),
    [
        ("method.py", '"""Do it."""', '"""Do it well."""  # at last', True),
        ("method.py", "task: Task) -> int", "task: object)", True),
        ("method.py", "return OTHER", "return 0", True),
        ("method.py", "OTHER = 4", "OTHER = 5", True),
        ("helper.py", "return 1\n", "return 2\n", True),
        ("method.py", "scaled(LIMIT)", "scaled(LIMIT + 1)", False),
        ("method.py", "LIMIT = 3", "LIMIT = 4", False),
        ("helper.py", "FACTOR = 2", "FACTOR = 3", False),
        ("helper.py", "x * FACTOR", "FACTOR * x * 1", False),
    ],
)
def test_the_code_that_a_function_reaches_counts(tmp_path: Path, file: str, old: str, new: str, same: bool) -> None:
    digests = []
    for number, (before, after) in enumerate([(old, old), (old, new)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, text in (("method.py", METHOD), ("helper.py", HELPER)):
            (folder / name).write_text(text.replace(before, after) if name == file else text)
        digests.append(digest_of(folder / "method.py", "method"))
    assert (digests[0] == digests[1]) is same


def test_a_file_that_is_edited_meanwhile_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "method.py").write_text(METHOD)
    before = digest_of(tmp_path / "method.py", "method")
    (tmp_path / "helper.py").write_text(HELPER.replace("FACTOR = 2", "FACTOR = 3"))
    assert digest_of(tmp_path / "method.py", "method") != before
