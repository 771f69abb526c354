"""How the wrapped methods are called: every signature that a release has had.

``signatures.json`` is made by ``python -m tools.sglang_release record``.  A wrapper passes all
arguments on, and for some methods looks at one of them: a signature that was never seen is read
before it is recorded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from sglang_weight_hook_patch_core import ENTRY_POINTS, REQUESTS, EntryPoint

from .findings import SIGNATURE, Finding, holder, place_of, title
from .paths import Paths
from .summaries import Summary

FILE = Path(__file__).with_name("signatures.json")

# Method, as findings name it -> signature -> the first release that had it.
Signatures = Mapping[str, Mapping[str, str]]


def known() -> Signatures:
    found: Signatures = json.loads(FILE.read_text("utf-8"))
    return found


def collected(summaries: Iterable[Summary]) -> dict[str, dict[str, str]]:
    """The signatures of all rows in these releases, which come oldest first."""
    found: dict[str, dict[str, str]] = {}
    rows = {title(place_of(entry)): place_of(entry) for entry in (*ENTRY_POINTS, *REQUESTS)}
    for summary in summaries:
        functions = {
            each.place: each for module in summary.modules.values() for each in module.functions
        }
        for name, place in rows.items():
            if place in functions:
                forms = found.setdefault(name, {})
                forms.setdefault(functions[place].signature, summary.version)
    return dict(sorted(found.items()))


def record(found: Mapping[str, Mapping[str, str]]) -> None:
    """Add to what is recorded: the releases at hand need not be all that there were."""
    before = known() if FILE.exists() else {}
    every = {name: {**before.get(name, {}), **found.get(name, {})} for name in {*before, *found}}
    FILE.write_text(json.dumps(dict(sorted(every.items())), indent=2) + "\n", "utf-8")


def changed(paths: Paths, due: Sequence[EntryPoint], recorded: Signatures) -> Iterator[Finding]:
    """Wrapped methods with a signature that no release had when it was recorded."""
    for entry in due:
        place = holder(paths, entry)
        if place is None:
            continue
        function = paths.functions[place]
        forms = recorded.get(title(place_of(entry)), {})
        if function.signature not in forms:
            before = list(forms)[-1] if forms else "never recorded"
            yield Finding(
                SIGNATURE,
                title(place),
                function.line,
                f"takes {function.signature}; the last one known is {before}",
                "see what the wrapper reads of its arguments (_effect, _details, _RUNNERS_OF in "
                "sglang_weight_hook_patch_core.py), then `python -m tools.sglang_release record`",
            )
