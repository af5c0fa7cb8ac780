"""The process of one mapping or joint integration: reads ``job.json`` of a directory, leaves ``answer.npz`` there."""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path


def main(scratch: Path) -> None:
    """Run the job and write its arrays."""
    warnings.simplefilter("ignore")
    import numpy as np
    from _machine import peak_mb
    from _mapping_methods import METHODS, Job

    content = json.loads((scratch / "job.json").read_text(encoding="utf-8"))
    job = Job(**{**content, "settings": tuple(content["settings"])})
    method, started = METHODS[job.method], time.perf_counter()
    if job.query:
        found = method.map(job, scratch)
    else:
        found = {"z": np.asarray(method.joint(job, scratch), np.float32)}
    plain = {name: array.astype(str) if array.dtype == object else array for name, array in found.items()}
    seconds = time.perf_counter() - started
    np.savez(scratch / "answer.npz", seconds=seconds, peak_mb=peak_mb(), **plain)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
