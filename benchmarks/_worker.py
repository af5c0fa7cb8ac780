"""The process of one method: reads ``task.json`` of a directory, leaves embeddings and ``answer.json`` there."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(scratch: Path) -> None:
    """Run the method that the task names and write its embeddings as npy files."""
    import numpy as np
    from _methods import method_of
    from _tasks import Task

    task = Task(**json.loads((scratch / "task.json").read_text(encoding="utf-8")))
    files, notes = {}, []
    for number, (name, z_nd) in enumerate(method_of(task.method).run(task, scratch).items()):
        if z_nd is None:
            notes.append(f"{name}: there is none in this run")
            continue
        if not np.isfinite(z_nd).all():
            bad = int((~np.isfinite(z_nd)).any(axis=1).sum())
            raise ValueError(f"{name} has NaN or infinite values in {bad} of {len(z_nd)} cells")
        files[name] = str(scratch / f"{number}.npy")
        np.save(files[name], np.ascontiguousarray(z_nd, dtype=np.float32))
    if (told := scratch / "notes.txt").exists():
        notes += told.read_text(encoding="utf-8").splitlines()
    (scratch / "answer.json").write_text(json.dumps({"embeddings": files, "notes": notes}), encoding="utf-8")


if __name__ == "__main__":  # methods may start processes, which import this file again
    main(Path(sys.argv[1]))
