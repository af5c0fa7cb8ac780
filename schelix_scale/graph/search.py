"""The neighbour search in a process of its own, whose libraries compile while the parent does other work.

pynndescent compiles for about half a minute in each new process. The process that is started here does that at once
and then waits for features; what the search holds goes back to the system when it ends. What it writes to standard
output and error is kept for the case that it fails: that a task is done is said by a file.
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
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

from schelix_scale.arrays import load_array, map_array
from schelix_scale.compute import keep_memory_low, release_memory
from schelix_scale.errors import GraphError
from schelix_scale.graph.knn import Neighbors, approximate_neighbors, compile_search
from schelix_scale.graph.vectors import forget, taken, unit_rows

METHOD, ANSWER = "pynndescent", "done"
PR_SET_PDEATHSIG = 1
POLL_SECONDS, END_SECONDS = 0.05, 5.0


class SearchProcess:
    """A process that is ready to find approximate neighbours; a context manager that ends it.

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
            stdout=self._log,
            stderr=self._log,
            text=True,
            process_group=0,  # Ctrl-C goes to the parent alone, which ends this process
        )

    def find(
        self, features: Path, seed: int, scratch: Path, rows: np.ndarray | None = None, k: int | None = None
    ) -> Neighbors:
        """Find the neighbours of features in a file, as `graph.knn.find_neighbors` does with the method pynndescent.

        Parameters
        ----------
        features
            An .npy file, (n, d).
        seed
            Seed of the search.
        scratch
            A directory for the result while it is handed over.
        rows
            The rows among which neighbours are searched, numbered as they stand there; all by default.
        k
            Another number of neighbours than the process was started for.

        Raises
        ------
        GraphError
            The process failed; the message has the end of what it wrote.
        """
        stdin = self._process.stdin
        assert stdin is not None
        with tempfile.TemporaryDirectory(prefix="search-", suffix=".partial", dir=scratch) as folder:
            task = {"features": str(features), "seed": seed, "out": folder, "rows": rows is not None, "k": k}
            if rows is not None:
                np.save(Path(folder) / "rows.npy", rows)
            try:
                print(json.dumps(task), file=stdin, flush=True)
            except BrokenPipeError:
                raise GraphError(f"the neighbour search failed: {self._complaint()}") from None
            while not (Path(folder) / ANSWER).exists():
                if self._process.poll() is not None and not (Path(folder) / ANSWER).exists():
                    raise GraphError(f"the neighbour search failed: {self._complaint()}")
                time.sleep(POLL_SECONDS)
            indices, distances = (load_array(Path(folder) / f"{name}.npy") for name in ("indices", "distances"))
        return Neighbors(indices, distances, METHOD)

    def _complaint(self) -> str:
        with suppress(subprocess.TimeoutExpired):  # of a process that reads no more, and yet goes on
            self._process.wait(END_SECONDS)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
            return "its process did not answer."
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
        for stream in (self._process.stdin, self._log):
            if stream is not None:
                with suppress(BrokenPipeError):  # of a task that it never read
                    stream.close()


def main(arguments: list[str]) -> None:
    """Compile, wait for tasks on standard input, do each and say so. Ends when the input does, or the parent."""
    keep_memory_low()
    if sys.platform == "linux":  # whatever this is doing; elsewhere it ends after its search
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    k, dims, threads = map(int, arguments)
    compiling = threading.Thread(target=compile_search, args=(dims, k, threads), daemon=True)
    compiling.start()
    while line := sys.stdin.readline():  # at once, so that the end of the parent is noticed while this compiles
        task = json.loads(line)
        try:
            features = map_array(task["features"])
            unit = unit_rows(taken(features, load_array(Path(task["out"]) / "rows.npy")) if task["rows"] else features)
            forget(features)
        except (OSError, ValueError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        compiling.join()
        indices, distances = approximate_neighbors(unit, task["k"] or k, task["seed"], threads)
        for name, values in (("indices", indices), ("distances", distances)):
            np.save(Path(task["out"]) / f"{name}.npy", values)
        del unit, indices, distances
        release_memory()
        (Path(task["out"]) / ANSWER).touch()
    os._exit(0)  # the thread that compiles cannot be stopped otherwise


if __name__ == "__main__":
    main(sys.argv[1:])
