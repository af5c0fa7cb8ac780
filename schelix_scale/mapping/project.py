"""Expression of new cells -> components of the reference, uncorrected: the first stage of a mapping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from schelix_scale.arrays import create_array
from schelix_scale.features.onepass import PASS_SHARE, block_size, write_rows
from schelix_scale.features.projection import Projection, clip_genes
from schelix_scale.features.streams import Streams
from schelix_scale.graph.vectors import row_blocks
from schelix_scale.mapping.drawn import DRAWN, Drawing
from schelix_scale.mapping.genes import require_genes, restricted_streams
from schelix_scale.mapping.inputs import batches_digest
from schelix_scale.mapping.matched import Matched, of_groups
from schelix_scale.mapping.query import MEASURED, MOVES, RAW, STREAMS, Query, content_order, drawn_step
from schelix_scale.records import StageRecord
from schelix_scale.scheduling import run_tasks
from schelix_scale.stores.checks import check_block
from schelix_scale.stores.values import ValueKind, decide_values

BLOCK_CELLS = 4_096  # that are projected at once: more take memory and no less time
RUNS, RUN_CELLS = 16, 125  # consecutive cells: a store reads them in few chunks
OF_BATCH = 20
KNOWN = "measured"  # beside the components: which cells have any value of a gene that the reference has too


@dataclass(frozen=True)
class _Encoder:
    """Turns the expression of cells that measured the same genes into components of the reference."""

    genes: Matched
    streams: Streams
    learned: tuple[np.ndarray, np.ndarray] | None
    mean_g: np.ndarray

    def encode(self, x_mq: sparse.csr_matrix, values: str) -> tuple[dict[str, np.ndarray], sparse.csr_matrix]:
        """Return uncorrected components of both streams, what learned loadings add to them, and who has any value.

        Beside it, the reference's values (m, g) of the genes that it uses.
        """
        x_mg, total_m = self.genes.values(x_mq, values)
        streams = self.streams
        found = {KNOWN: total_m > 0, "anchor": streams.anchor.apply(x_mg)}
        found["variant"] = found["anchor"][:, :0] if streams.variant is None else streams.variant.apply(x_mg)
        if self.learned is not None:
            for name, part, weights in zip(STREAMS, (streams.anchor, streams.variant), self.learned, strict=True):
                found[f"{name}_learned"] = _learned(
                    x_mg, part, weights, found[name], self.genes.match.place_g, self.mean_g
                )
        return found, x_mg


def _learned(
    x_mg: sparse.csr_matrix,
    part: Projection | None,
    weights_hd: np.ndarray,
    like: np.ndarray,
    place_g: np.ndarray,
    mean_g: np.ndarray,
) -> np.ndarray:
    """Return what learned loadings add, (m, d); genes that the query lacks are at the reference's mean."""
    if part is None:
        return np.zeros_like(like)
    lacking_h = place_g[part.genes] < 0
    mean_h = np.minimum(mean_g[part.genes], part.cap)
    moved = clip_genes(x_mg[:, part.genes], part.cap) @ weights_hd
    return np.asarray(moved + mean_h[lacking_h] @ weights_hd[lacking_h], np.float32)


def project(query: Query, drawn: int = 0) -> StageRecord:
    """Write the uncorrected components of all cells, in one pass over the store.

    Of so many cells of each batch as are ``drawn`` the expression is kept, see `mapping.drawn`.
    """
    frozen, store, settings = query.frozen, query.store, query.settings
    inputs: dict[str, Any] = {"source": store.fingerprint(), "values": settings.values, "gene_key": settings.gene_key}
    inputs |= {"min_genes": settings.min_genes, "version": 3}
    inputs["drawn"] = [drawn, batches_digest(query.batches)] if drawn else None

    def make() -> tuple[list[str], dict[str, Any]]:
        encoders = _encoders(query)
        values = _values(query)
        dims = dict(zip(STREAMS, frozen.streams.dims, strict=True))
        learned = encoders[0].learned is not None
        names = {name: RAW.format(name) for name in STREAMS}
        names |= {f"{name}_learned": MOVES.format(name) for name in STREAMS} if learned else {}
        n = store.n_cells
        with ExitStack() as published, query.reporter.stage("project", n) as progress:
            targets = {name: published.enter_context(query.directory.publish(file)) for name, file in names.items()}
            for name, path in targets.items():
                create_array(path, (n, dims[name.partition("_")[0]]), "float32")
            targets[KNOWN] = published.enter_context(query.directory.publish(MEASURED))
            create_array(targets[KNOWN], (n,), "bool")
            size = block_size(store, int(PASS_SHARE * query.budget), query.threads, BLOCK_CELLS)
            used = np.flatnonzero(encoders[0].genes.match.used_g)
            step = drawn_step(frozen)
            drawing = Drawing(len(query.batches.names), drawn, used, query.directory.path)

            def task(span: tuple[int, int]) -> int:
                rows = np.arange(*span)
                x_mq = store.read(rows)
                check_block(x_mq, rows, store, values)
                parts: dict[str, list[np.ndarray]] = {}
                for chosen, found, x_mg in _encode(query, encoders, x_mq, rows, values):
                    if drawn:
                        mine, order = rows[chosen], content_order(found["anchor"], step)
                        drawing.offer(mine, query.batches.codes[mine], order, x_mg, found[KNOWN])
                    for name, part in {"place": chosen, **found}.items():
                        parts.setdefault(name, []).append(part)
                back = np.argsort(np.concatenate(parts.pop("place")))  # as the rows of the block are
                for name, found_m in parts.items():
                    write_rows(targets[name], span[0], np.concatenate(found_m)[back])
                return len(rows)

            with drawing:
                run_tasks(task, list(row_blocks(n, size)), query.threads, None, progress.advance)
                if drawn:
                    known = np.stack([encoder.genes.match.place_g[used] >= 0 for encoder in encoders])
                    drawing.write(published.enter_context(query.directory.publish(DRAWN)), known)
        facts = min((encoder.genes.match for encoder in encoders), key=lambda match: match.used_share).facts()
        blind = _say_blind(query)
        made = [*names.values(), MEASURED, *([DRAWN] if drawn else [])]
        return made, {**facts, "cells_without_genes": blind, "values": values, "learned": learned}

    return query.stage("project", inputs, [], make)


def _encode(
    query: Query, encoders: Sequence[_Encoder], x_mq: sparse.csr_matrix, rows: np.ndarray, values: str
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray], sparse.csr_matrix]]:
    """Encode a block, the cells of each group that measured the same genes apart: yield their places, and what it is.

    See `_Encoder.encode`.
    """
    for group, chosen in of_groups(query, rows):
        yield chosen, *encoders[group].encode(x_mq if len(chosen) == len(rows) else x_mq[chosen], values)


def _say_blind(query: Query) -> int:
    """Count the cells without any value of a gene that the reference has, and warn of them."""
    blind = int((~query.load(MEASURED)).sum())
    if blind:
        query.reporter.warn(
            f"{blind:,} of {query.store.n_cells:,} cells have no counts of any gene that the reference has: nothing is "
            "known of them, so their labels are unknown and their latents mean nothing. Drop them"
        )
    return blind


def _encoders(query: Query) -> list[_Encoder]:
    """Match genes and restrict the projections to those that are there, for each group of cells."""
    frozen, store, settings, genes = query.frozen, query.store, query.settings, query.frozen.genes
    rows = frozen.sample
    spread = [np.asarray(frozen.raw_na[rows], np.float64).var(axis=0), np.zeros(0)]
    if frozen.streams.variant is not None:
        spread[1] = np.asarray(frozen.variant_nv[rows], np.float64).var(axis=0)
    learned = None
    if frozen.model.loadings is not None:
        parts = frozen.model.loadings.anchor, frozen.model.loadings.variant
        learned = (parts[0].detach().numpy(), parts[1].detach().numpy())
    power, encoders = frozen.config.features.scale_power, []
    for found in query.matched:
        require_genes(found.match, store, genes, settings.min_genes)
        streams = restricted_streams(frozen.streams, found.match, genes, power, (spread[0], spread[1]))
        encoders.append(_Encoder(found, streams, learned, genes["mean"].to_numpy()))
    worst = min((found.match for found in query.matched), key=lambda one: one.used_share)
    facts = worst.facts()
    say = query.reporter.warn if facts["used_genes_missing"] else query.reporter.say
    lacking = f"; {facts['used_genes_missing']:,} of those it uses are missing ({1 - worst.used_share:.1%})"
    say(
        f"{facts['genes_matched']:,} of {len(genes):,} genes of the reference are there ({worst.by})"
        + (lacking if facts["used_genes_missing"] else "")
    )
    return encoders


def decided_rows(batch_n: np.ndarray) -> np.ndarray:
    """Return the cells, ascending, that tell what the values are: runs of them, and 20 of each batch at least."""
    starts = np.linspace(0, max(len(batch_n) - RUN_CELLS, 0), RUNS).astype(np.int64)
    rows = np.unique(np.minimum(starts[:, None] + np.arange(RUN_CELLS), len(batch_n) - 1))
    seen = np.bincount(batch_n[rows], minlength=int(batch_n.max()) + 1)
    order = np.argsort(batch_n, kind="stable")
    first = np.searchsorted(batch_n[order], np.flatnonzero(seen < OF_BATCH))
    last = np.searchsorted(batch_n[order], np.flatnonzero(seen < OF_BATCH), side="right")
    more = [order[start : min(start + OF_BATCH, stop)] for start, stop in zip(first, last, strict=True)]
    return np.unique(np.concatenate([rows, *more]))


def _values(query: Query) -> ValueKind:
    """Decide what the values of the query are, and say so."""
    store = query.store
    rows = decided_rows(query.batches.codes)
    x_mq = store.read(rows)
    check_block(x_mq, rows, store)
    decision = decide_values(x_mq, query.batches.codes[rows], query.batches.names, query.settings.values)
    query.reporter.say(f"values are {decision.reason}")
    if "log" in (decision.kind, query.frozen.values) and decision.kind != query.frozen.values:
        query.reporter.warn(
            f"the query's values are {decision.kind}, the reference's {query.frozen.values}: they only fit if the "
            "logarithms are log1p of counts per 10,000"
        )
    return decision.kind
