"""The architecture: imports go one way, heavy libraries are imported where they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "schelix_scale"

# A module may import those of earlier lines and of its own line; a new top-level module gets a place here.
LAYERS = [
    {"_version", "errors"},
    {"config"},
    {"config_io", "config_changes"},
    {"interruptions"},
    {"progress", "compute", "scheduling"},
    {"publish", "locking", "provenance"},
    {"arrays"},
    {"records"},
    {"run_directory"},
    {"run"},
    {"stores"},
    {"genes"},
    {"features"},
    {"requirements"},
    {"graph"},
    {"model"},
    {"training"},
    {"budget"},
    {"inspection"},
    {"embedding", "export", "export_soma"},
    {"transfer"},
    {"metrics"},
    {"report"},
    {"context"},
    {"recorded"},
    {"stages"},
    {"mapping"},
    {"extending"},
    {"continuing"},
    {"pipeline"},
    {"demo"},
    {"output"},
    {"cli_options"},
    {"cli_app"},
    {"cli_run", "cli_map"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

HEAVY = {
    "anndata",
    "dask",
    "distributed",
    "h5py",
    "harmonypy",
    "matplotlib",
    "pyarrow",
    "pynndescent",
    "scanpy",
    "sklearn",
    "tiledbsoma",
    "torch",
    "umap",
    "zarr",
}
AT_TOP_LEVEL = {"torch": {"model", "training", "embedding"}}

MODULES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(nodes: Iterator[ast.AST] | list[ast.stmt], path: Path) -> Iterator[tuple[str, int]]:
    """Yield (dotted name, line) of what the nodes import; relative imports are made absolute."""
    package = ("schelix_scale", *path.relative_to(PACKAGE).parent.parts)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) + 1 - node.level], *([node.module] if node.module else [])])
            base = base if node.level else str(node.module)
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def runs_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run when the module is imported: not functions, not ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            yield from (below for other in node.orelse for below in (other, *runs_at_import(other)))
            continue
        yield node
        yield from runs_at_import(node)


def upward_imports(source: str, path: Path) -> list[str]:
    here = layer_of(path)
    forbidden = {"model": {"stores", "graph"}}.get(here, set())
    problems = []
    for name, line in imported(list(ast.walk(ast.parse(source))), path):
        root, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if root != "schelix_scale" or target not in RANK:
            continue  # a public name of the package itself is caught below, by its own test
        if RANK[target] > RANK[here] or target in forbidden:
            problems.append(f"{path.name}:{line} in layer {here} imports {name} of layer {target}")
    return problems


def misplaced_heavy_imports(source: str, path: Path) -> list[str]:
    here = layer_of(path)
    tree = ast.parse(source)
    problems = []
    for name, line in imported(runs_at_import(tree), path):
        root = name.split(".")[0]
        if root in HEAVY and here not in AT_TOP_LEVEL.get(root, set()):
            problems.append(
                f"{path.name}:{line} imports {root} when it is imported; do so in the function that needs it"
            )
    for name, line in imported(list(ast.walk(tree)), path):
        if name.split(".")[0] == "pynndescent" and path != PACKAGE / "graph" / "knn.py":
            problems.append(f"{path.name}:{line} imports pynndescent; only graph/knn.py may")
    return problems


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_module_keeps_to_its_layer(path: Path) -> None:
    source = path.read_text()
    if path == PACKAGE / "__init__.py":
        eager = [name for name, _ in imported(runs_at_import(ast.parse(source)), path) if name.startswith("schelix")]
        assert eager == ["schelix_scale._version.__version__"]
        return
    assert layer_of(path) in RANK, f"give {layer_of(path)} a place in LAYERS"
    assert upward_imports(source, path) == []
    assert misplaced_heavy_imports(source, path) == []


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("stores/x.py", "from schelix_scale.graph import knn", "layer stores imports schelix_scale.graph.knn"),
        ("stores/x.py", "from ..graph import knn", "layer stores imports schelix_scale.graph.knn"),
        ("run.py", "def f():\n    import schelix_scale.cli", "layer run imports schelix_scale.cli"),
        ("run.py", "from schelix_scale import pipeline", "layer run imports schelix_scale.pipeline"),
        ("model/x.py", "from schelix_scale.graph.knn import f", "layer model imports"),
        ("model/x.py", "import schelix_scale.stores.base", "layer model imports"),
        ("stores/x.py", "import zarr", "imports zarr when it is imported"),
        ("stores/x.py", "try:\n    import h5py\nexcept ImportError:\n    pass", "imports h5py when it is imported"),
        ("stores/x.py", "class A:\n    from anndata import AnnData", "imports anndata when it is imported"),
        ("graph/x.py", "import torch", "imports torch when it is imported"),
        ("graph/x.py", "def f():\n    import pynndescent", "only graph/knn.py may"),
    ],
)
def test_the_rules_find_violations(module: str, source: str, problem: str) -> None:
    path = PACKAGE / module
    assert problem in "\n".join(upward_imports(source, path) + misplaced_heavy_imports(source, path))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("graph/knn.py", "def f():\n    import pynndescent"),
        ("model/x.py", "import torch\nfrom .y import z\nfrom schelix_scale.errors import SchelixError"),
        ("stores/x.py", "if TYPE_CHECKING:\n    from anndata import AnnData"),
    ],
)
def test_the_rules_let_good_imports_pass(module: str, source: str) -> None:
    path = PACKAGE / module
    assert upward_imports(source, path) + misplaced_heavy_imports(source, path) == []


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = set(python("import sys, schelix_scale; print(*{name.split('.')[0] for name in sys.modules})").split())
    assert "schelix_scale" in loaded
    assert loaded & (HEAVY | {"numpy", "pandas", "pydantic", "rich", "scipy", "typer"}) == set()


def test_public_names_load_when_used() -> None:
    assert (
        python("from schelix_scale import Config, Run, load_config; print(load_config().seed, Config().seed)")
        == "0 0\n"
    )


def test_public_names_are_pinned() -> None:
    import schelix_scale

    names = {
        "Config",
        "Reference",
        "Run",
        "SchelixError",
        "__version__",
        "continue_run",
        "extend",
        "integrate",
        "load_config",
        "map_cells",
        "open_store",
        "prepare",
    }
    assert set(schelix_scale.__all__) == names
    assert names <= set(dir(schelix_scale))
    with pytest.raises(AttributeError, match="has no attribute 'integrat'"):
        _ = schelix_scale.integrat
