"""The results file, the printed table and the section of the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _report
import pytest
from _report import BEGIN, END, METRICS

README = Path(_report.__file__).with_name("README.md")


def row(
    method: str = "pca", total: float | None = 0.5, seed: int = 0, data: str = "kang", **other: Any
) -> dict[str, Any]:
    return {
        "data": data,
        "batch_key": "batch",
        "n_cells": 1_200,
        "n_batches": 3,
        "n_labels": 5,
        "method": method,
        "seed": seed,
        "settings": [],
        "seconds": 3.0,
        "peak_mb": 400.0,
        "metrics": {**dict.fromkeys(METRICS, 0.25), "total": total},
        "commit": "0123456789abcdef",
        "dirty": False,
        "machine": {"cpu": "A CPU", "cores": 2, "ram_gb": 8.0, "python": "3.11.7", "platform": "Linux x86_64"},
        "versions": {"scib-metrics": "0.5.10"},
        "date": "2025-01-02T03:04:05+00:00",
        **other,
    }


def test_new_rows_replace_a_method_with_its_parts_and_seeds_and_keep_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "results" / "quality.json"
    old = [row("pca"), row("schelix"), row("schelix", seed=1), row("schelix:anchor"), row("schelix", data="worm")]
    assert _report.write_rows(path, old) == old
    new = [row("schelix", 0.7)]
    assert _report.write_rows(path, new) == [old[0], old[4], *new]
    assert _report.read_rows(path) == [old[0], old[4], *new]
    assert [entry.name for entry in path.parent.iterdir()] == ["quality.json"]


def test_another_file_is_not_taken_for_results(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match="not a results file"):
        _report.read_rows(path)


def test_the_table_has_means_deviations_and_the_difference() -> None:
    rows = [row("schelix", 0.8), row("schelix", 0.6, 1), row("harmony", 0.5), row("harmony", 0.5, 1), row("pca", None)]
    lines = _report.text_table(rows).splitlines()
    total = list(_report.COLUMNS).index("total") - len(_report.COLUMNS)
    assert lines[0] == "kang, batch key batch: 1,200 cells, 3 batches, 5 labels"
    assert [line.split()[total] for line in lines[1:]] == ["total", "0.700", "0.141", "0.500", "0.000", "-", "+0.200"]
    assert lines[3].startswith("  ± sd of 2")
    assert {len(line) for line in lines[1:]} == {16 + 8 * len(_report.COLUMNS)}


def test_the_readme_section_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    rows = [row("pca", 0.5), row("schelix", 0.75), row("schelix", 0.65, 1, settings=["graph.k=9"], dirty=True)]
    for _ in range(2):  # the second time it finds its own table
        _report.update_readme(readme, rows)
        text = readme.read_text()
        assert text.startswith(f"before\n{BEGIN}\n| data (batch key) | cells | method | seeds | isolab |")
        assert text.endswith(f"\n{END}\nafter\n")
        assert "old" not in text
    lines = text.splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert {len(cells) for cells in table} == {len(_report.COLUMNS) + 4}
    assert table[2][:4] == ["kang (batch)", "1,200", "pca", "1"]
    assert [cells[-3] for cells in table[2:]] == ["0.500", "**0.700 ± 0.071**"]
    assert lines[-4] == (
        "- 2025-01-02, commit 0123456789 with uncommitted changes: A CPU, 2 cores, 8 GB, Python 3.11.7, "
        "Linux x86_64, scib-metrics 0.5.10; schelix with graph.k=9"
    )


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"])
def test_a_readme_without_one_pair_of_marks_is_left_alone(tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="once each"):
        _report.update_readme(readme, [row()])
    assert readme.read_text() == text


def test_our_own_readme_has_the_marks_and_names_every_column(tmp_path: Path) -> None:
    text = README.read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(text, encoding="utf-8")
    _report.update_readme(copy, [row()])
    described = text.partition("## What the columns mean")[2].partition("## Results")[0]
    assert [name for name in _report.COLUMNS.values() if name not in described] == []
