"""The neighbour search in a process of its own, whose libraries compile while the parent does other work.

pynndescent compiles for about half a minute in each new process. The process that is started here does that at once
and then waits for features; what the search holds goes back to the system when it ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

from schelix_scale.compute import keep_memory_low
from schelix_scale.config import GraphConfig
from schelix_scale.errors import GraphError
from schelix_scale.graph.knn import Neighbors, approximate_neighbors, choose_method, compile_search, unit_rows

FROM_CELLS = 20_000  # below, compiling in this process costs less than a process of its own
METHOD = "pynndescent"
PR_SET_PDEATHSIG = 1


def worth_a_process(n_cells: int, config: GraphConfig) -> bool:
    """Whether the search among ``n_cells`` takes long enough for a process of its own."""
    return choose_method(n_cells, config) == METHOD and n_cells >= FROM_CELLS


class SearchProcess:
    """A process that is ready to find approximate neighbours once; a context manager that ends it.

    Parameters
    ----------
    k
        Neighbours of a cell.
    dims
        Dimensions of the features, as far as they are known: code is compiled for any number of them.
    threads
        Threads of the search; part of the result.
    """

    def __init__(self, k: int, dims: int, threads: int) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "schelix_scale.graph.search", str(k), str(dims), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            process_group=0,  # Ctrl-C goes to the parent alone, which ends this process
        )

    def find(self, features_nd: np.memmap, seed: int, scratch: Path) -> Neighbors:
        """Find the neighbours of features in a file, as `graph.knn.find_neighbors` does with the method pynndescent.

        Parameters
        ----------
        features_nd
            (n, d) memory map of an .npy file.
        seed
            Seed of the search.
        scratch
            A directory for the result while it is handed over.

        Raises
        ------
        GraphError
            The process failed; the message has the end of what it wrote.
        """
        with tempfile.TemporaryDirectory(prefix="search-", suffix=".partial", dir=scratch) as folder:
            task = {"features": str(features_nd.filename), "seed": seed, "out": folder}
            try:
                answer, _ = self._process.communicate(json.dumps(task) + "\n")
            except BrokenPipeError:
                answer = ""
            if self._process.wait() != 0 or answer.strip() != "done":
                raise GraphError(f"the neighbour search failed: {self._complaint()}")
            indices, distances = (np.load(Path(folder) / f"{name}.npy") for name in ("indices", "distances"))
        return Neighbors(indices, distances, METHOD)

    def _complaint(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        code = self._process.returncode
        how = f"its process was killed by signal {-code}" if code < 0 else f"its process ended with status {code}"
        hint = ", often because memory ran out: close other programs, or use a machine with more" if code == -9 else ""
        return f"{how}{hint}." + (f" It said: {' / '.join(lines[-3:])}" if lines else "")

    def __enter__(self) -> Self:
        """Return the process."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()


def main(arguments: list[str]) -> None:
    """Compile, wait for one task on standard input, do it, and say so. Ends when the parent does."""
    keep_memory_low()
    if sys.platform == "linux":  # whatever this is doing; elsewhere it ends after its search
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    k, dims, threads = map(int, arguments)
    compiling = threading.Thread(target=compile_search, args=(dims, k, threads), daemon=True)
    compiling.start()
    line = sys.stdin.readline()  # at once, so that the end of the parent is noticed while this compiles
    if not line:
        os._exit(0)  # the thread that compiles cannot be stopped otherwise
    task = json.loads(line)
    try:
        unit = unit_rows(np.load(task["features"], mmap_mode="r"))
    except (OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    compiling.join()
    indices, distances = approximate_neighbors(unit, k, task["seed"], threads)
    for name, values in (("indices", indices), ("distances", distances)):
        np.save(Path(task["out"]) / f"{name}.npy", values)
    print("done")


if __name__ == "__main__":
    main(sys.argv[1:])
