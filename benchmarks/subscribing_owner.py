"""A process that publishes a model and updates it when it is told to, for `subscribing`.

    python -m benchmarks.subscribing_owner without|unset|one FOLDER

``without``: the publisher's modules are compiled with ``subscription.current`` taken for None and
``subscription.ensure()`` taken out.  FOLDER: where compiled modules are kept.
"""

from __future__ import annotations

import ast
import importlib.machinery
import os
import sys
import threading
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Optional

TENSORS = 1342
_PUBLISHER = "sglang_weight_hook.publisher"
# What it does when it is told to: how it is called in the table, and how often in a turn.
ACTIONS = {"update": ("an update that moves nothing", 20), "bucket": ("a bucket", 200)}
_CALLS = {
    "update": ("update_weights_from_disk", "update"),
    "bucket": ("update_weights_from_tensor", "stream"),
}


class Nothing:
    """The least that a subscriber can be."""

    def before(self, slot: str, event: Any) -> None: ...
    def after(self, slot: str, document: Any, diff: Any) -> None: ...
    def gone(self, slot: str) -> None: ...


def nothing() -> Nothing:
    return Nothing()


class _Folded(ast.NodeTransformer):
    """As if the source knew nothing of subscribers."""

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        if _is_current(node.left) and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            return ast.copy_location(ast.Constant(isinstance(node.ops[0], ast.Is)), node)
        return self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        folded = self.generic_visit(node)
        assert isinstance(folded, ast.BoolOp)
        ending = isinstance(folded.op, ast.Or)  # what decides it, whatever else there is
        first = folded.values[0]
        if isinstance(first, ast.Constant) and bool(first.value) is ending:
            return first
        return folded

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return ast.copy_location(ast.Constant(None), node) if _is_current(node) else node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if ast.unparse(node) == "subscription.ensure()":
            return ast.copy_location(ast.Pass(), node)
        return self.generic_visit(node)


def _is_current(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "subscription.current"


class _Loader(importlib.machinery.SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, **more: Any) -> Any:  # type: ignore[override]
        tree = _Folded().visit(ast.parse(data))
        return compile(ast.fix_missing_locations(tree), path, "exec")


class _Finder:
    """Finds the publisher's modules, in every kind of process: it takes its time, too."""

    def __init__(self, folds: bool) -> None:
        self._folds = folds

    def find_spec(
        self, name: str, path: Optional[Sequence[str]] = None, target: Optional[ModuleType] = None
    ) -> Optional[importlib.machinery.ModuleSpec]:
        if not name.startswith(_PUBLISHER + ".") or name.endswith(".subscription"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if self._folds and spec is not None and str(spec.origin).endswith(".py"):
            spec.loader = _Loader(name, str(spec.origin))
        return spec


def main() -> None:
    kind, compiled = sys.argv[1:]
    from .models import Runner, make_model

    model = make_model(TENSORS)
    sys.pycache_prefix = os.path.join(compiled, kind)
    sys.meta_path.insert(0, _Finder(folds=kind == "without"))
    started = time.process_time()
    from sglang_weight_hook.publisher import recorder

    runner = Runner(model)
    recorder.finish(recorder.begin("load", "load", [runner]), None, None)
    recorder.finish(recorder.begin("settle", "settle", ()), None, None)
    took = time.process_time() - started
    print(took, len(sys.modules), threading.active_count(), flush=True)
    for line in sys.stdin:
        action, times = line.split()
        method, effect = _CALLS[action]
        started = time.process_time()
        for _ in range(int(times)):
            token = recorder.begin(method, effect, [runner])
            recorder.finish(token, (True, "done"), None)
        print((time.process_time() - started) / int(times), flush=True)


if __name__ == "__main__":
    main()
