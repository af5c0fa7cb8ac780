"""Genes of a query -> genes of the reference, and the reference's projections for the genes that are there."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import sparse

from schelix_scale.errors import DataError
from schelix_scale.features.projection import Projection
from schelix_scale.features.streams import Streams
from schelix_scale.genes.normalize import TARGET_SUM
from schelix_scale.genes.partition import ANCHOR
from schelix_scale.stores.anndata import AnnDataStore
from schelix_scale.stores.base import CellStore
from schelix_scale.stores.memory import MemoryStore

NAMES = "var_names"
NO_NAME = ("", "nan", "none", "<na>", "na")
_VERSION = re.compile(r"^(ENS[A-Z]*\d{6,})\.\d+$")


@dataclass(frozen=True)
class GeneMatch:
    """Which gene of a query each gene of the reference is.

    Attributes
    ----------
    place_g
        (g,) positions in the query, -1 for a gene that it lacks.
    used_g
        (g,) bool: the genes that the reference's features are made of.
    by
        What of the query was matched with what of the reference.
    """

    place_g: np.ndarray
    used_g: np.ndarray
    by: str

    @property
    def used_share(self) -> float:
        """Share of the used genes that the query has."""
        return float((self.place_g[self.used_g] >= 0).mean())

    def facts(self) -> dict[str, object]:
        """Return what the manifest says of the match."""
        lacking = int((self.used_g & (self.place_g < 0)).sum())
        return {
            "genes_matched": int((self.place_g >= 0).sum()),
            "genes_reference": len(self.place_g),
            "used_genes_missing": lacking,
            "used_genes_missing_share": round(1 - self.used_share, 6),
            "genes_matched_by": self.by,
        }


def match_genes(store: CellStore, genes: pd.DataFrame, used_g: np.ndarray, gene_key: str | None) -> GeneMatch:
    """Match genes by name, or by whichever other text column of either side matches more.

    Parameters
    ----------
    genes
        The reference's gene table, indexed by name.
    used_g
        (g,) bool: genes of the streams.
    gene_key
        The query's column to match, instead of trying all; ``var_names`` are the names.

    Raises
    ------
    DataError
        The query has no such column.
    """
    ours = {NAMES: _texts(genes.index)} | {str(name): _texts(genes[name]) for name in genes if _is_text(genes[name])}
    ours.pop("role", None)
    theirs = query_names(store)
    if gene_key is not None:
        if gene_key not in theirs:
            raise DataError(
                f"{store.source} has no var column {gene_key!r} (gene_key). It has: {', '.join(theirs) or 'none'}."
            )
        theirs = {gene_key: theirs[gene_key]}
    best: GeneMatch | None = None
    for name, index in theirs.items():
        for other, names in ours.items():
            place_g = _places(names, index)
            found = GeneMatch(place_g, used_g, f"{name} = {other}")
            if best is None or found.used_share > best.used_share + 1e-9:
                best = found
    assert best is not None
    return best


def query_names(store: CellStore) -> dict[str, pd.Index]:
    """Return all that names the genes of a store: their names, and text columns of var, without versions of ids."""
    table = store.gene_table()
    if table is None and isinstance(store, AnnDataStore | MemoryStore):
        table = store.gene_columns()
    names = {NAMES: _texts(store.gene_names)}
    if table is not None:
        names |= {str(name): _texts(table[name]) for name in table}
    return names


def _is_text(column: pd.Series) -> bool:
    """Whether a column may hold text: of type object, or of one of pandas' types of text."""
    return bool(pd.api.types.is_object_dtype(column) or pd.api.types.is_string_dtype(column))


def _texts(names: pd.Index | pd.Series) -> pd.Index:
    """Names as text, without versions of ids; what is missing is empty, and matches nothing."""
    texts = pd.Series(np.asarray(names, dtype=object)).map(str).str.strip()
    return pd.Index(texts.mask(texts.str.casefold().isin(NO_NAME), "").map(lambda text: _VERSION.sub(r"\1", text)))


def require_genes(match: GeneMatch, store: CellStore, genes: pd.DataFrame, minimum: float) -> None:
    """Raise unless the query has enough of the genes that the reference uses.

    Raises
    ------
    DataError
        With examples of both names and the remedy.
    """
    if match.used_share >= minimum:
        return
    used = int(match.used_g.sum())
    there = int((match.place_g[match.used_g] >= 0).sum())
    examples = (", ".join(map(str, names[:3])) for names in (store.gene_names, genes.index[match.used_g]))
    raise DataError(
        f"{store.source} has {there} of the {used} genes that the reference uses ({match.used_share:.1%}); mapping "
        f"needs {minimum:.0%} (min_genes). Its genes are named {next(examples)}; the reference's {next(examples)}. "
        "Check that both are of one species and name genes by the same kind of ids, name the var column that has them "
        "with gene_key (--set gene_key=NAME), or lower min_genes for a small panel."
    )


def reference_values(
    x_mq: sparse.csr_matrix, match: GeneMatch, values: str, target: float, total_m: np.ndarray | None = None
) -> sparse.csr_matrix:
    """Log-normalise a query's block as the reference was: (m, g) CSR, with the values of the used genes alone.

    A cell's total is over the genes that the reference has too, and becomes ``target``: 1e4 times the share that these
    genes have in the reference (`shared_target`). ``total_m`` are those of `shared_totals`, where they are known.
    """
    places = np.flatnonzero(match.used_g & (match.place_g >= 0))
    picked = sparse.csr_matrix(x_mq[:, match.place_g[places]])
    data = picked.data
    if values != "log":
        totals = shared_totals(x_mq, match) if total_m is None else total_m
        factors = np.divide(target, totals, out=np.zeros_like(totals), where=totals > 0)
        data = np.log1p(data * np.repeat(factors, np.diff(picked.indptr)))
    shape = (x_mq.shape[0], len(match.place_g))
    return sparse.csr_matrix((data.astype(np.float32), places[picked.indices], picked.indptr), shape=shape)


def shared_totals(x_mq: sparse.csr_matrix, match: GeneMatch) -> np.ndarray:
    """Return the sums of each cell's values of the genes that the reference has too, (m,) float64."""
    shared_q = np.zeros(x_mq.shape[1], np.float64)
    shared_q[match.place_g[match.place_g >= 0]] = 1.0
    return np.asarray(x_mq @ shared_q, np.float64).ravel()


def shared_target(match: GeneMatch, mean_g: np.ndarray, variance_g: np.ndarray) -> float:
    """Sum to which a query's shared genes are normalised: 1e4 if it has all genes of the reference.

    What is known of a gene are mean and variance (g,) of its logarithms. Its mean before the logarithm is that of the
    gene which is 0 in a share of cells and one value in all others, with this mean and variance: most genes are 0 in
    most cells, where exp(mean) - 1 would be far too low.
    """
    square_g = variance_g + mean_g**2
    value_g = np.divide(square_g, mean_g, out=np.zeros_like(square_g), where=mean_g > 0)
    on_g = np.divide(mean_g**2, square_g, out=np.zeros_like(square_g), where=square_g > 0)
    share_g = on_g * np.expm1(value_g)
    total = share_g.sum()
    return TARGET_SUM * float(share_g[match.place_g >= 0].sum() / total) if total > 0 else TARGET_SUM


def restricted_streams(
    streams: Streams, match: GeneMatch, genes: pd.DataFrame, scale_power: float, spread: tuple[np.ndarray, np.ndarray]
) -> Streams:
    """Return projections for the genes that a query has; those of the reference if it has all.

    Missing genes count as what the genes that are there lead to expect, given how the reference's components vary
    (`_restricted`); a cell about which nothing is known is at the mean.

    Parameters
    ----------
    spread
        (a,) and (v,) variances of the reference's uncorrected components.
    """
    role_h = genes["role"].to_numpy()[streams.anchor.genes]
    weight_h = np.where(role_h == ANCHOR, 1.0, 1.0 - streams.strength)  # as `project_anchors` fitted them
    anchor = _restricted(streams.anchor, match, genes, scale_power, spread[0], weight_h)
    variant = None
    if streams.variant is not None:
        variant = _restricted(streams.variant, match, genes, scale_power, spread[1])
    return replace(streams, anchor=anchor, variant=variant)


def _restricted(
    projection: Projection,
    match: GeneMatch,
    genes: pd.DataFrame,
    scale_power: float,
    spread_d: np.ndarray,
    weight_h: np.ndarray | None = None,
) -> Projection:
    """Return the expected projection on all genes, given those that are there: linear, so a projection again.

    Scaled genes are x = C z + noise, with C the (h, d) orthonormal components, z of variance ``spread_d`` and noise of
    variance s. With P the genes that are there, the rest of the projection is expected to be
    C_M' C_M (C_P' C_P + s / spread)^-1 C_P' x_P (principal components with missing data: Tipping & Bishop 1999).
    ``weight_h`` (h,) are the weights, above 0, that `fit_projection` multiplied scaled genes by; 1 by default.
    """
    lacking_h = match.place_g[projection.genes] < 0
    whole = replace(projection, offset_pd=None)
    if not lacking_h.any():
        return whole
    mean_h = np.minimum(genes["mean"].to_numpy()[projection.genes], projection.cap)
    variance_h = genes["var"].to_numpy()[projection.genes]
    scale_h = np.where(variance_h > 0, np.sqrt(variance_h), 1.0) ** scale_power
    scale_h = scale_h if weight_h is None else scale_h / weight_h
    loadings_hd = projection.loadings_hd.astype(np.float64)
    components_hd = loadings_hd * scale_h[:, None]
    lacking_dd = components_hd[lacking_h].T @ components_hd[lacking_h]
    there_dd = components_hd[~lacking_h].T @ components_hd[~lacking_h]
    left = (variance_h / scale_h**2).sum() - spread_d.sum()
    noise = max(left / max(len(scale_h) - len(spread_d), 1), 1e-9)
    expected_dd = np.linalg.solve(there_dd + np.diag(noise / np.maximum(spread_d, 1e-9)), lacking_dd)
    completed_dd = np.eye(len(spread_d)) + expected_dd
    offset_d = projection.offset_d - mean_h[lacking_h] @ loadings_hd[lacking_h]
    return replace(
        whole,
        loadings_hd=(loadings_hd @ completed_dd).astype(np.float32),
        offset_d=(offset_d @ completed_dd).astype(np.float32),
    )


def _places(names: pd.Index, query: pd.Index) -> np.ndarray:
    """Positions of names in the query's, (g,) int64, -1 for none.

    Of a name that the query repeats the first is taken, and of one that the reference repeats the first is matched, so
    that no value counts for two genes.
    """
    where = np.flatnonzero(~query.duplicated())
    found = query[where].get_indexer(names)
    matched = (found >= 0) & (names != "") & ~names.duplicated()
    return np.where(matched, where[found], -1).astype(np.int64)
