"""``python -m sglang_weight_hook`` and ``sglang-weight-hook``: the command.

What it needs beyond the standard library (typer and rich) is the ``cli`` extra.  Reading from
Python (`sglang_weight_hook.reader`) goes without.
"""

from __future__ import annotations

import sys


def main() -> int:
    try:
        from .commands.entry import main as run

        return run()
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich", "click"):
            raise
        if sys.argv[1:] in (["doctor"], ["doctor", "--json"]):
            # In the environment that serves, typer need not be installed.
            from .commands import diagnosis

            return diagnosis.say_plainly("--json" in sys.argv)
        remedy = (
            "pip install typer rich"
            if sys.version_info >= (3, 10)
            else "use it from Python 3.10 or later"
        )
        sys.stderr.write(
            f"sglang-weight-hook: {error.name} is not installed in this Python: {remedy}\n"
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
