"""The benchmarks are a plain folder of scripts that import their neighbours."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
