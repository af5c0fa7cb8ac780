"""The results file, the printed table and the section of the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _readme
import _report
import pytest
from _picture import draw, points
from _readme import BEGIN, END
from _report import GUARDS, METRICS

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
        "notes": [],
        "seconds": 3.0,
        "peak_mb": 400.0,
        "metrics": {**dict.fromkeys(METRICS, 0.25), "total": total},
        "guards": dict.fromkeys(GUARDS, 0.5),
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


def table_of(text: str) -> list[list[str]]:
    return [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_the_readme_section_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    rows = [row("pca", 0.5), row("schelix", 0.75), row("schelix", 0.65, 1, settings=["graph.k=9"], dirty=True)]
    for _ in range(2):  # the second time it finds its own table
        _readme.update_readme(readme, rows)
        text = readme.read_text()
        assert text.startswith(f"before\n{BEGIN}\n### Totals\n\n| method | kang (batch) | mean | isolab |")
        assert text.endswith(f"\n{END}\nafter\n")
        assert "old" not in text
    assert [line for line in text.splitlines() if line.startswith("### ")] == ["### Totals", "### All scores"]
    table = table_of(text.partition("### All scores")[2])
    assert {len(cells) for cells in table} == {len(_report.COLUMNS) + 4}
    assert table[2][:4] == ["kang (batch)", "1,200", "pca", "1"]
    total = table[0].index("total")
    assert [cells[total] for cells in table[2:]] == ["0.500", "**0.700 ± 0.071**"]
    assert text.splitlines()[-4] == (
        "- 2025-01-02, commit 0123456789 with uncommitted changes: A CPU, 2 cores, 8 GB, Python 3.11.7, "
        "Linux x86_64; scib-metrics 0.5.10; schelix with graph.k=9"
    )


def test_totals_name_the_best_peer_and_the_gap() -> None:
    rows = [
        *(row("schelix", total, data=data) for data, total in (("kang", 0.8), ("worm", 0.5))),
        *(row("schelix:anchor", 0.9, data=data) for data in ("kang", "worm")),
        *(row("pca", total, data=data) for data, total in (("kang", 0.4), ("worm", 0.6))),
        *(row("harmony", total, data=data) for data, total in (("kang", 0.7), ("worm", 0.5))),
        *(row("scanvi", 0.95, data=data) for data in ("kang", "worm")),
        row("scvi", 0.65),
    ]
    table = {cells[0]: cells[1:] for cells in table_of(_readme.totals(rows))}
    guards = ["0.250", "0.500", "0.500"]
    assert table["method"] == ["kang (batch)", "worm (batch)", "mean", "isolab", "kept", "private"]
    assert table["schelix"] == ["**0.800**", "0.500", "**0.650**", *guards]
    assert table["pca"][:2] == ["0.400", "**0.600**"]
    assert table["scanvi (sees labels)"] == ["0.950", "0.950", "0.950", *guards]
    assert table["scvi"] == ["0.650", "-", "-", "-", "-", "-"]
    assert table["best peer"][:3] == ["harmony", "pca", "harmony"]
    assert table["schelix - best peer"][:3] == ["+0.100", "-0.100", "+0.050"]
    assert "schelix:anchor" not in table


def test_totals_of_several_starts_take_their_means_of_nmi_and_ari() -> None:
    # NMI and ARI are .25 with one start; .45 and .75 on average are .7 more, of which a fifth of .6 goes into the total
    starts = {"nmi": [0.3, 0.6], "ari": [0.7, 0.8]}
    rows = [row("schelix", 0.5, starts=starts), row("schelix", 0.6, seed=1, starts=starts), row("harmony", 0.4)]
    table = {cells[0]: cells[1:] for cells in table_of(_readme.totals(rows))}
    # single starts add .06 and .108: two numbers that differ by .048 have a deviation of .034
    assert table["schelix, k-means of several starts (one: ± 0.034)"] == ["0.634", "0.634", "", "", ""]
    assert not any(name.startswith("harmony,") for name in table)
    # a data set without isolated labels: a fourth
    metrics = {**rows[0]["metrics"], "isolated_labels": None}
    found = _report.totals_of_starts({**rows[0], "metrics": metrics})
    assert found == pytest.approx([0.5 + 0.6 * 0.5 / 4, 0.5 + 0.6 * 0.9 / 4])


def test_a_guard_is_averaged_over_the_sets_that_have_it() -> None:
    rows = [row(data="kang", guards={"private_purity": 0.5}), row(data="worm", guards={"private_purity": None})]
    rows.append(row(data="pancreas", guards={"private_purity": 0.7}))
    assert table_of(_readme.totals(rows))[2][-1] == "0.600"


def test_ablations_are_compared_with_the_default() -> None:
    rows = [
        *(row("schelix", total, data=data) for data, total in (("kang", 0.8), ("worm", 0.6))),
        *(row("schelix@no-x", total, data=data, settings=["x=0"]) for data, total in (("kang", 0.7), ("worm", 0.65))),
        row("harmony", 0.9),
    ]
    assert table_of(_readme.ablations(rows))[2:] == [
        ["nothing: the default", "", "0.800", "0.600", "0.700", "-"],
        ["no-x", "`x=0`", "0.700", "0.650", "0.675", "-0.025"],
    ]


def test_splits_are_means_over_seeds() -> None:
    rows = [
        {**row("schelix", seed=seed), "largest": "b1", "corrected": seed == 1, "against_pca": pca, "against_own": own}
        for seed, pca, own in [(0, 0.4, 1.0), (1, 0.5, 0.9)]
    ]
    assert table_of(_readme.splits(rows))[2] == [
        "kang (batch): b1",
        "1,200",
        "schelix",
        "2",
        "1 of 2",
        "0.450",
        "0.950",
    ]


@pytest.mark.parametrize(
    ("run", "seconds"),
    [
        ({"others": 0.05, "threads": 2, "nice": 0}, "3.0"),
        ({"others": None, "threads": 2, "nice": 0}, "3.0"),
        ({"others": 0.6, "threads": 2, "nice": 0}, "~3.0"),
        ({"others": 0.0, "threads": 1, "nice": 0}, "~3.0"),
        ({"others": 0.0, "threads": 2, "nice": 15}, "~3.0"),
    ],
)
def test_seconds_of_a_busy_machine_are_marked(run: dict[str, Any], seconds: str) -> None:
    table = table_of(_readme.markdown([row(run={**run, "machine": row()["machine"]})]))
    assert table[2][-2] == seconds


def test_notes_of_runs_are_told_below_the_table() -> None:
    rows = [row("scvi", seed=seed, notes=["its counts are rounded"]) for seed in (0, 1)]
    lines = _readme.markdown(rows).splitlines()
    assert lines[-2] == "- scvi on kang: its counts are rounded"


def test_the_picture_has_a_dot_a_method_and_is_the_same_again(tmp_path: Path) -> None:
    rows = [row("schelix"), row("schelix", seed=1), row("pca"), row("schelix:variant"), row("harmony", data="worm")]
    rows[1]["metrics"] |= {"batch": 0.75, "bio": 0.5}
    assert points(rows[:4]) == {"schelix": (0.5, 0.375), "pca": (0.25, 0.25)}
    for name in ("a.png", "b.png"):
        draw(rows, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"])
def test_a_readme_without_one_pair_of_marks_is_left_alone(tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="once each"):
        _readme.update_readme(readme, [row()])
    assert readme.read_text() == text


def test_our_own_readme_has_the_marks_and_names_every_column(tmp_path: Path) -> None:
    text = README.read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(text, encoding="utf-8")
    _readme.update_readme(copy, [row()])
    described = text.partition("## What the columns mean")[2].partition("## Results")[0]
    assert [name for name in _report.COLUMNS.values() if name not in described] == []
