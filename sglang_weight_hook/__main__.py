"""``python -m sglang_weight_hook``."""

from __future__ import annotations

import sys


def main() -> int:
    from .reader import HookError, open_directory

    try:
        for slot in open_directory(sys.argv[1] if len(sys.argv) > 1 else None).slots():
            print(slot.read(), "alive" if slot.owner_alive() else "owner gone")
    except HookError as error:
        print(f"sglang-weight-hook: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
