"""Which cells the reference has, which shares are taken, and what the table says of them."""

from __future__ import annotations

import numpy as np
import pytest
from _mapping_types import references, shares, table


def test_a_type_is_taken_out_of_all_batches_or_of_all_but_one() -> None:
    group = np.repeat(["a", "b", "c"], 60)
    label = np.tile(np.repeat(["x", "y", "rare"], [30, 25, 5]), 3)
    found = list(references(group, label, "a", "b"))
    assert [(name, where) for name, where, _ in found] == [
        ("x", "no batch"),
        ("x", "one batch"),
        ("y", "no batch"),
        ("y", "one batch"),
    ]
    for name, where, rows in found:
        assert set(group[rows]) == {"b", "c"}
        assert set(group[rows][label[rows] == name]) == (set() if where == "no batch" else {"b"})
        assert (label[rows] != name).sum() == (np.isin(group, ["b", "c"]) & (label != name)).sum()


def test_shares_are_of_the_type_and_of_others_that_are_known() -> None:
    p = np.array([0.001, 0.03, 0.5, 0.01, 0.9, 0.001])
    true = np.array(["x", "x", "x", "y", "y", "nowhere"])
    found = shares(p, true, "x", {"y", "z"}, "labels")
    assert found == {
        "type_labels_0.01": pytest.approx(1 / 3),
        "type_labels_0.05": pytest.approx(2 / 3),
        "others_labels_0.01": 0.5,
        "others_labels_0.05": 0.5,
    }


def test_the_table_has_means_of_each_kind() -> None:
    about = {
        "data": "d",
        "query": "a",
        "alone": "b",
        "cells": 7,
        "date": "2026-11-28T",
        "commit": "c" * 40,
        "threads": 2,
    }
    rows = []
    for place, (label, where) in enumerate([("x", "no batch"), ("y", "no batch"), ("x", "one batch")]):
        made = {
            f"{part}_{name}_{level}": place / 10
            for part in ("type", "others")
            for name in ("labels", "plain")
            for level in (0.01, 0.05)
        }
        rows.append({**about, "label": label, "where": where, "reference_cells": 9, **made})
    found = table(rows)
    assert "| **mean** | | | no batch | 0.050 |" in found
    assert "| **mean** | | | one batch | 0.200 |" in found
    assert "| d, a | x | 7 | 9 in b | 0.20 | 0.20 | 0.200 |" in found
