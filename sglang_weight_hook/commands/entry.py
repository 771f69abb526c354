"""Starts the command that is named: only that one is imported, and `slots` without typer."""

from __future__ import annotations

import importlib
import sys

# In the order in which `--help` lists them; `slots` is in a file beside what it answers.
COMMANDS = (
    *("slots", "top", "show", "report", "regions", "lookup", "diff", "watch", "history"),
    *("verify", "doctor", "plot", "save", "compare", "checksum", "scrub"),
    *("serve",),
)
_FILES = {"slots": "slots_command"}


def main() -> int:
    """Run the command line; the exit status."""
    if sys.argv[1:2] == ["slots"]:
        from . import slots

        status = slots.plainly(sys.argv[2:])
        if status is not None:
            return status
    import rich  # noqa: F401  # missing, it is named before anything is read

    from . import app

    named = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    for command in [named] if named in COMMANDS else COMMANDS:
        importlib.import_module(f"{__package__}.{_FILES.get(command, command)}")
    app.app.registered_commands.sort(key=lambda one: COMMANDS.index(one.name or ""))
    return app.main()
