"""What the tests of the run directory share, also with the processes they start."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from schelix_scale.run import RunDirectory

SOURCE = {"uri": "cells.h5ad", "layer": "X", "fingerprint": "abc"}


PRELUDE = """
import os, resource, signal, sys
from pathlib import Path
import numpy as np
from schelix_scale.config import Config
from schelix_scale.arrays import create_array
from schelix_scale.run import RunDirectory
from tests.run_tools import SOURCE, fill
"""


def fill(run: RunDirectory, stage: str = "genes", content: bytes = b"0123456789", name: str = "genes.bin") -> str:
    """Do a stage that publishes one file."""
    fingerprint = run.fingerprint(stage, 1, {"content": content.decode()})
    run.begin(stage)
    with run.publish(name) as path:
        path.write_bytes(content)
    run.finish(stage, fingerprint, [name], 1.5, {"n": len(content)})
    return fingerprint


def child(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run code in another process that has the names above."""
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False, timeout=120, **options
    )


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def killed(code: str, path: Path) -> None:
    done = child(code, path)
    assert done.returncode == -signal.SIGKILL, done.stderr
