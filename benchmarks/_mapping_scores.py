"""Answers of a mapping and the truth -> scores. Labels are compared where the reference has the true one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

NEIGHBORS = 30
BETWEEN = "; "


def label_scores(answer: Mapping[str, np.ndarray], truth: np.ndarray, known: np.ndarray) -> dict[str, float]:
    """Score labels of query cells whose type the reference has.

    ``unknown`` is a wrong label there. Coverage and size are those of 90 % label sets, of methods that have any; those
    that an ``unknown`` cell has are empty.
    """
    from sklearn.metrics import f1_score

    from schelix_scale.transfer import expected_calibration_error

    true, label = truth[known], answer["label"][known]
    correct = label == true
    scores = {
        "macro_f1": float(f1_score(true, label, labels=np.unique(true), average="macro", zero_division=0)),
        "accuracy": float(correct.mean()),
        "ece": expected_calibration_error(answer["probability"][known], correct),
    }
    if "set" in answer:
        sets = [set(text.split(BETWEEN)) - {"unknown"} for text in answer["set"][known]]
        scores["coverage"] = float(np.mean([name in found for name, found in zip(true, sets, strict=True)]))
        scores["set_size"] = float(np.mean([len(found) for found in sets]))
    return scores


def novelty_auroc(answer: Mapping[str, np.ndarray], novel: np.ndarray) -> float:
    """Area under the curve: how well the novelty score tells cells of a type that the reference lacks."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(novel, answer["novelty"]))


def novel_above(answer: Mapping[str, np.ndarray], novel: np.ndarray, share: float = 0.01) -> float:
    """How many cells of types that the reference lacks score above all but this share of the others.

    The threshold is taken with the truth, so that all scores are compared at the same share of false alarms.
    """
    return float((answer["novelty"][novel] > np.quantile(answer["novelty"][~novel], 1 - share)).mean())


def flagged_shares(answer: Mapping[str, np.ndarray], novel: np.ndarray) -> dict[str, float]:
    """How many cells of types that the reference lacks are called ``unknown``, and of others; of methods that do."""
    if "flagged" not in answer:
        return {}
    flagged = answer["flagged"]
    return {"unknown_novel": float(flagged[novel].mean()), "unknown_others": float(flagged[~novel].mean())}


def overlap(
    z_joint: np.ndarray, z_reference: np.ndarray, z_query: np.ndarray, reference: np.ndarray, query: np.ndarray
) -> float:
    """Mean share of a query cell's 30 nearest cells, of all, that are the same in the joint integration.

    ``reference`` and ``query`` are the rows of ``z_joint`` that these cells have.
    """
    from sklearn.neighbors import NearestNeighbors

    rows = np.concatenate([reference, query])
    mapped = np.concatenate([z_reference, z_query])
    own = np.arange(len(reference), len(rows))
    found = []
    for z in (mapped, z_joint[rows]):
        near = NearestNeighbors(n_neighbors=NEIGHBORS + 1).fit(z).kneighbors(z[own], return_distance=False)
        found.append([set(row[row != cell][:NEIGHBORS].tolist()) for row, cell in zip(near, own, strict=True)])
    return float(np.mean([len(a & b) / NEIGHBORS for a, b in zip(*found, strict=True)]))
