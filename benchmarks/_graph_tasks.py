"""What `graph.py` runs in processes of their own: one neighbour search or one diffusion, from files to files.

    python benchmarks/_graph_tasks.py hnswlib '{"features": "x.npy", "k": 30, "seed": 0, "threads": 2, ...}' OUT

OUT, a directory, gets the results and ``answer.json``: the files (``indices``, (n, k) without or (n, k + 1) with the
cell itself, -1 where nothing was found; or ``diffused``) and the seconds of the parts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from _graph_features import unit_rows

QUERIES = 100_000


class Clock:
    """Seconds of named parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of a block to a part."""
        started = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - started, 2)


def schelix(task: dict[str, Any], out: Path, clock: Clock) -> dict[str, Any]:
    """Ours, as a run builds and audits it, by ``graph.method`` = ``search`` in ``budget`` bytes (None: the default)."""
    from schelix_scale.config import Config, GraphConfig, memory_budget
    from schelix_scale.graph.build import build_neighbors
    from schelix_scale.progress import QuietReporter

    budget = task["budget"] or memory_budget(Config())
    config, reporter = GraphConfig(k=task["k"], method=task["search"]), QuietReporter()
    features_nd = np.load(task["features"], mmap_mode="r")
    with clock.part("build and audit"):
        found, audit = build_neighbors(features_nd, out, config, task["seed"], task["threads"], budget, reporter)
    told = {"search": found.method, "messages": reporter.messages, "budget_bytes": budget}
    return {"indices": _saved(found.indices_nk, out), "audit": audit.to_dict(), **told}


def pynndescent(task: dict[str, Any], out: Path, clock: Clock) -> dict[str, Any]:
    """pynndescent with its defaults."""
    with clock.part("import"):
        from pynndescent import NNDescent
    unit_nd = _read(task, clock)
    with clock.part("build"):
        index = NNDescent(
            unit_nd,
            metric="euclidean",
            n_neighbors=task["k"] + 1,
            random_state=task["seed"],
            n_jobs=task["threads"],
        )
    return {"indices": _saved(index.neighbor_graph[0], out)}


def faiss_ivf(task: dict[str, Any], out: Path, clock: Clock) -> dict[str, Any]:
    """FAISS, inverted lists of whole vectors."""
    import faiss

    unit_nd = _read(task, clock)
    d = unit_nd.shape[1]
    with clock.part("build"):
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, task["nlist"], faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = task["seed"]
        index.train(unit_nd)
        index.add(unit_nd)
        index.nprobe = task["nprobe"]
    return {"indices": _queried(unit_nd, lambda rows: index.search(rows, task["k"] + 1)[1], task, out, clock)}


def faiss_hnsw(task: dict[str, Any], out: Path, clock: Clock) -> dict[str, Any]:
    """FAISS, hierarchical navigable small worlds."""
    import faiss

    unit_nd = _read(task, clock)
    with clock.part("build"):
        index = faiss.IndexHNSWFlat(unit_nd.shape[1], task["m"])
        index.hnsw.efConstruction = task["ef_construction"]
        index.add(unit_nd)
        index.hnsw.efSearch = task["ef"]
    return {"indices": _queried(unit_nd, lambda rows: index.search(rows, task["k"] + 1)[1], task, out, clock)}


def hnswlib(task: dict[str, Any], out: Path, clock: Clock) -> dict[str, Any]:
    """hnswlib."""
    import hnswlib

    unit_nd = _read(task, clock)
    with clock.part("build"):
        index = hnswlib.Index(space="l2", dim=unit_nd.shape[1])
        index.init_index(len(unit_nd), M=task["m"], ef_construction=task["ef_construction"], random_seed=task["seed"])
        index.set_num_threads(task["threads"])
        index.add_items(unit_nd)
        index.set_ef(task["ef"])
    return {"indices": _queried(unit_nd, lambda rows: index.knn_query(rows, task["k"] + 1)[0], task, out, clock)}


def diffuse_schelix(task: dict[str, Any], out: Path, clock: Clock) -> dict[str, Any]:
    """Ours, stream by stream, from memory maps to memory maps; first a few cells, for what has to be compiled."""
    from schelix_scale.graph.diffusion import diffuse
    from schelix_scale.graph.operator import Operator

    operator = Operator(*(np.load(task[name], mmap_mode="r") for name in ("indices", "weights")))
    with clock.part("start"):
        few, size = min(1_000, operator.n_cells), len(task["streams"])
        sample = Operator(np.asarray(operator.indices_nk[:few]) % few, np.asarray(operator.weights_nk[:few]))
        first = np.load(task["streams"][0], mmap_mode="r")[:few]
        diffuse(sample, first, task["hops"], task["restart"], out / "few.npy")
    order = None if task["order"] is None else np.load(task["order"])
    files = [out / f"stream{number}.npy" for number in range(size)]
    with clock.part("diffusion"):
        for stream, target in zip(task["streams"], files, strict=True):
            features = np.load(stream, mmap_mode="r")
            diffuse(operator, features, task["hops"], task["restart"], target, workers=task["threads"], order=order)
    return {"diffused": [str(file) for file in files]}


def diffuse_scipy(task: dict[str, Any], out: Path, clock: Clock) -> dict[str, Any]:
    """SciPy's CSR times all columns at once, everything in memory; only the steps are the diffusion."""
    from scipy import sparse

    with clock.part("read"):
        indices, weights = (np.load(task[name]) for name in ("indices", "weights"))
        origin = np.hstack([np.load(stream) for stream in task["streams"]])
        n, k = indices.shape
        matrix = sparse.csr_matrix((weights.ravel(), indices.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    restart, found, current = np.float32(task["restart"]), {0: origin}, origin
    with clock.part("diffusion"):
        for hop in range(1, max(task["hops"]) + 1):
            current = matrix @ current
            current *= 1 - restart
            current += restart * origin
            if hop in task["hops"]:
                found[hop] = current
    for hop in task["hops"]:
        np.save(out / f"hop{hop}.npy", found[hop])
    return {"diffused": [str(out / f"hop{hop}.npy") for hop in task["hops"]]}


TASKS: dict[str, Callable[[dict[str, Any], Path, Clock], dict[str, Any]]] = {
    "schelix": schelix,
    "pynndescent": pynndescent,
    "faiss-ivf": faiss_ivf,
    "faiss-hnsw": faiss_hnsw,
    "hnswlib": hnswlib,
    "diffuse-schelix": diffuse_schelix,
    "diffuse-scipy": diffuse_scipy,
}


def _read(task: dict[str, Any], clock: Clock) -> np.ndarray:
    """Read all features as unit rows: on them Euclidean distances order as cosine ones do."""
    with clock.part("read"):
        return unit_rows(np.load(task["features"]))


def _queried(
    unit_nd: np.ndarray, search: Callable[[np.ndarray], np.ndarray], task: dict[str, Any], out: Path, clock: Clock
) -> str:
    """Ask for the neighbours of all rows, block by block; return the file."""
    shape = (len(unit_nd), task["k"] + 1)
    result = np.lib.format.open_memmap(out / "indices.npy", mode="w+", dtype=np.int32, shape=shape)
    with clock.part("query"):
        for start in range(0, len(unit_nd), QUERIES):
            result[start : start + QUERIES] = search(unit_nd[start : start + QUERIES])
    result.flush()
    return str(out / "indices.npy")


def _saved(indices_nk: np.ndarray, out: Path) -> str:
    """Return the file of a memory map, or of an array, which is written."""
    if isinstance(indices_nk, np.memmap) and indices_nk.filename is not None:
        return str(indices_nk.filename)
    np.save(out / "indices.npy", indices_nk)
    return str(out / "indices.npy")


def main(name: str, task: str, out: str) -> None:
    """Do one task and leave its answer."""
    clock = Clock()
    answer = TASKS[name](json.loads(task), Path(out), clock)
    text = json.dumps({**answer, "parts": clock.seconds})
    (Path(out) / "answer.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":  # workers may import this file again
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    main(*sys.argv[1:])
