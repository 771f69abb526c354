"""SGLang's files as syntax trees: which class defines which method, found without importing."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from typing import Optional


class Sources:
    """SGLang's files as syntax trees, each parsed once."""

    def __init__(self, folders: list[str]) -> None:
        self._folders = folders
        self._trees: dict[str, Optional[ast.Module]] = {}

    def exists(self, path: str) -> bool:
        """Whether there is a file, or a package, below SGLang's package."""
        return any(os.path.exists(os.path.join(folder, path)) for folder in self._folders)

    def defines(self, module: str, owner: str, name: str, depth: int = 4) -> bool:
        """Whether ``module`` has function ``name``, in class ``owner`` unless that is empty.

        Bases and names imported from other modules of SGLang are followed.
        """
        tree = self._tree(module)
        if tree is None or depth == 0:
            return False
        if not owner:
            return any(bound == name for bound, _ in _bound(tree.body))
        for bound, node in _bound(tree.body):
            if bound != owner:
                continue
            if isinstance(node, ast.ImportFrom):
                return self.defines(_origin(node, module), _original(node, owner), name, depth - 1)
            if not isinstance(node, ast.ClassDef):
                return False
            if any(member == name for member, _ in _bound(node.body)):
                return True
            return any(
                self.defines(module, base.id, name, depth - 1)
                for base in node.bases
                if isinstance(base, ast.Name)
            )
        return False

    def _tree(self, module: str) -> Optional[ast.Module]:
        if module not in self._trees:
            self._trees[module] = self._parse(module)
        return self._trees[module]

    def _parse(self, module: str) -> Optional[ast.Module]:
        parts = module.split(".")[1:]
        for folder in self._folders:
            base = os.path.join(folder, *parts)
            for path in (base + ".py", os.path.join(base, "__init__.py")):
                try:
                    with open(path, "rb") as file:
                        return ast.parse(file.read())
                except (OSError, SyntaxError, ValueError, RecursionError):
                    continue
        return None


def _bound(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Names that statements bind, also those inside ``if``, ``try`` and ``with``."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, node
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, node
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            for field in ("body", "orelse", "finalbody"):
                yield from _bound(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from _bound(handler.body)


def _origin(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return node.module or ""
    base = module.split(".")[: -node.level]
    return ".".join([*base, node.module] if node.module else base)


def _original(node: ast.ImportFrom, name: str) -> str:
    return next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
