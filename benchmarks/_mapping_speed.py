"""How fast is a large reference mapped onto and extended? The command line is run and measured as its users run it.

    python benchmarks/_mapping_speed.py RUN QUERY --batch-key batch --label-key cell_type

Prints, and keeps in results/mapping-speed.json: cells, seconds of each stage and of the whole command, cells a second
with and without what is done once for a reference (calibration), and the peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _machine import ROOT, circumstances, threads

ONCE = ("calibrate",)


def measure(verb: str, run: str, query: str, options: Sequence[str], out: Path) -> dict[str, Any]:
    """Run ``schelix VERB RUN QUERY -o OUT``; return seconds, memory and what its manifest says."""
    command = [sys.executable, "-m", "schelix_scale", verb, run, query, "-o", str(out), "--quiet", *options]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    stages = {name: record["seconds"] for name, record in manifest["stages"].items()}
    new = manifest["summary"].get("extension", manifest["summary"])["cells"]
    steady = sum(value for name, value in stages.items() if name not in ONCE)
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "verb": verb,
        "cells": new,
        "reference_cells": manifest["summary"].get("reference_cells", manifest["summary"]["cells"] - new),
        "seconds": round(seconds, 2),
        "stages": stages,
        "cells_per_second": round(new / seconds, 1),
        "cells_per_second_steady": round(new / steady, 1),
        "peak_mb": round(usage.ru_maxrss * unit / 1e6, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="a finished run")
    parser.add_argument("query", metavar="QUERY", help="new cells")
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--label-key", default=None, help="transfer labels too")
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "benchmarks" / "results" / "mapping-speed.json")
    arguments = parser.parse_args(argv)
    batch = ["--batch-key", arguments.batch_key]
    label = ["--label-key", arguments.label_key] if arguments.label_key else []
    rows = []
    with tempfile.TemporaryDirectory(prefix="mapping-speed-") as scratch:
        for verb, options in (("map", [*batch, *label]), ("extend", batch)):
            row = measure(verb, arguments.run, arguments.query, options, Path(scratch) / verb)
            rows.append({**row, **circumstances(), "threads": threads()})
            print({name: row[name] for name in row if name != "stages"}, row["stages"], flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
