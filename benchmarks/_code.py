"""What a function's result depends on in the code: a digest that changes when the function could do something else.

Counted are the function, everything in this folder that it names (directly or through others; in other files what is
imported by ``from file import name``), and the files of schelix_scale that any of them imports: all of them for
``from schelix_scale import ...``. Comments, docstrings, annotations and layout do not count.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _tasks import HERE, ROOT

PACKAGE = "schelix_scale"


def code_digest(function: Callable[..., Any]) -> str:
    """Return the digest of a function that is defined at the top of a file in this folder."""
    return digest_of(HERE / f"{function.__module__}.py", function.__name__)


def digest_of(file: Path, name: str) -> str:
    """Return the digest of a top-level name of a file."""
    todo, seen = [(file, name)], set()
    package: set[Path] = set()
    texts: dict[str, str] = {}
    while todo:
        here = todo.pop()
        if here in seen:
            continue
        seen.add(here)
        defined, imported = _top_level(here[0])
        for node in defined.get(here[1], ()):
            texts[f"{here[0].name}:{here[1]}"] = texts.get(f"{here[0].name}:{here[1]}", "") + ast.dump(node)
            used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            todo += [(here[0], other) for other in used & defined.keys()]
            for module, original in [*_imports(node), *(imported[other] for other in used & imported.keys())]:
                if (neighbour := file.with_name(f"{module}.py")).is_file():
                    todo.append((neighbour, original))
                elif module.partition(".")[0] == PACKAGE:
                    package |= set(_package_files(module))
    texts |= {str(path.relative_to(ROOT)): ast.dump(_tree(path)) for path in package}
    return hashlib.sha256("\n".join(f"{key} {texts[key]}" for key in sorted(texts)).encode()).hexdigest()


class _Bare(ast.NodeTransformer):
    """Drop what does not run: docstrings and annotations."""

    def visit(self, node: ast.AST) -> Any:
        node = self.generic_visit(node)
        for field in ("annotation", "returns"):
            if hasattr(node, field) and not isinstance(node, ast.AnnAssign):
                setattr(node, field, None)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node


def _tree(path: Path) -> ast.Module:
    return _parsed(path, path.stat().st_mtime_ns)


@functools.cache
def _parsed(path: Path, changed: int) -> ast.Module:
    """Return what a file says as of its time of change."""
    return _Bare().visit(ast.parse(path.read_text(encoding="utf-8")))


def _top_level(path: Path) -> tuple[dict[str, list[ast.stmt]], dict[str, tuple[str, str]]]:
    """Return what a file defines at its top, by name, and what it imports there: name -> module and name in it."""
    defined: dict[str, list[ast.stmt]] = {}
    imported = {}
    for node in _tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        defined.setdefault(part.id, []).append(node)
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    return defined, imported


def _imports(node: ast.AST) -> Iterator[tuple[str, str]]:
    for part in ast.walk(node):
        if isinstance(part, ast.ImportFrom) and part.module:
            yield from ((part.module, alias.name) for alias in part.names)


def _package_files(module: str) -> list[Path]:
    """Return the files a module of the package stands for: all for the package itself, else its own."""
    if module == PACKAGE:
        return sorted((ROOT / PACKAGE).rglob("*.py"))
    path = ROOT.joinpath(*module.split("."))
    return [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
