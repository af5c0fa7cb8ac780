"""Folds, scores and tables of the mapping benchmark."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
from _mapping_folds import folds, write_fold
from _mapping_report import BEGIN, END, read_rows, table, update_readme, write_rows
from _mapping_scores import flagged_shares, label_scores, novel_above, novelty_auroc, overlap
from mapping import main

from tests.benchmarks.data import made_up


def test_each_value_is_left_out_with_and_without_a_type(tmp_path: Path) -> None:
    made_up(tmp_path / "a.h5ad")
    obs = anndata.read_h5ad(tmp_path / "a.h5ad").obs
    found = list(folds(tmp_path / "a.h5ad", "batch", "cell_type"))
    assert [(fold.value, fold.lacking) for fold in found] == [
        ("0", None),
        ("0", "type 0"),
        ("1", None),
        ("1", "type 1"),
    ]
    for fold in found:
        assert set(obs["batch"].astype(str).iloc[fold.query]) == {fold.value}
        assert fold.value not in set(obs["batch"].astype(str).iloc[fold.reference])
        assert fold.lacking not in set(obs["cell_type"].iloc[fold.reference])
    reference, query = write_fold(found[1], "batch", "cell_type", tmp_path)
    assert anndata.read_h5ad(reference).n_obs == len(found[1].reference)
    assert "cell_type" not in anndata.read_h5ad(query).obs


def test_scores_by_hand() -> None:
    truth = np.array(["a", "a", "b", "c"])
    answer = {
        "label": np.array(["a", "b", "b", "a"]),
        "probability": np.array([1.0, 0.5, 1.0, 1.0]),
        "set": np.array(["a", "a; b", "unknown", "a"]),
        "novelty": np.array([0.1, 0.2, 0.3, 0.9]),
    }
    known = np.array([True, True, True, False])
    found = label_scores(answer, truth, known)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert found["ece"] == pytest.approx(0.5 / 3)
    assert (found["coverage"], found["set_size"]) == (pytest.approx(2 / 3), 1.0)
    assert novelty_auroc(answer, ~known) == 1.0
    assert flagged_shares(answer, ~known) == {}, "the method flags nothing"
    answer["flagged"] = np.array([True, False, False, True, True])
    novel = np.array([True, True, False, False, False])
    assert flagged_shares(answer, novel) == {"unknown_novel": 0.5, "unknown_others": pytest.approx(2 / 3)}


def test_unseen_types_are_compared_at_the_same_share_of_false_alarms() -> None:
    novel = np.repeat([True, False], [4, 200])
    answer = {"novelty": np.r_[196.5, 198.5, 50, 500, np.arange(200)]}
    assert novel_above(answer, novel) == 0.5, "two of the others, one in a hundred, are above"
    assert novel_above(answer, novel, 0.02) == 0.75


def test_overlap_is_one_for_the_same_positions_and_chance_for_others() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(400, 5))
    rows = rng.permutation(400)
    reference, query = rows[:300], rows[300:]
    assert overlap(z, z[reference], z[query], reference, query) == 1.0
    other = rng.normal(size=(400, 5))
    assert overlap(z, other[reference], other[query], reference, query) == pytest.approx(30 / 400, abs=0.04)


def test_rows_are_replaced_and_shown(tmp_path: Path) -> None:
    row = {"data": "d", "by": "donor", "fold": "1", "method": "schelix", "seed": 0, "macro_f1": 0.5}
    out = tmp_path / "results" / "mapping.json"
    write_rows(out, [row, {**row, "fold": "2", "macro_f1": 0.7}])
    write_rows(out, [{**row, "macro_f1": 0.9}, {**row, "method": "symphony", "auroc": 0.25}])
    assert len(read_rows(out)) == 3
    text = table(read_rows(out))
    assert "| d, donor | schelix | 2 | 0.800 | - |" in text
    assert "| d, donor | symphony | 1 | 0.500 |" in text
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    update_readme(readme, read_rows(out))
    assert readme.read_text() == f"before\n{BEGIN}\n{text}\n{END}\nafter\n"
    plain = tmp_path / "plain.md"
    plain.write_text("nothing")
    with pytest.raises(ValueError, match="once each"):
        update_readme(plain, [])


def test_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_up(tmp_path / "a.h5ad")
    asked = {
        "unknown method x": [f"{tmp_path}/a.h5ad:batch", "--methods", "x"],
        "no obs column donor": [f"{tmp_path}/a.h5ad:donor"],
        "write FILE:COLUMN": ["a.h5ad"],
        "no DATA:COLUMN": [],
    }
    for message, arguments in asked.items():
        assert main([*arguments, "--methods", "schelix"] if "--methods" not in arguments else arguments) == 2
        assert message in capsys.readouterr().err
