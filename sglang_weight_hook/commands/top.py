"""``sglang-weight-hook top``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .app import Misused, command
from .directories import directories_of
from .options import DirsOption


@command(
    "top",
    "sglang-weight-hook top\nsglang-weight-hook top --dir '/shared/maps/*' --interval 0.5",
)
def top(
    directories: DirsOption = None,
    interval: Annotated[
        float, typer.Option(help="Look again every S seconds.", metavar="S", min=0.1, max=3600)
    ] = 1.0,
) -> int:
    """Show all slots live: state, last event, memory.

    q quits, ? lists the keys; Enter, h and r open a slot's tensors, history and regions.
    The view needs a terminal, and Textual (pip install textual).
    """
    try:
        from .render.live import LiveView
    except ImportError as error:
        if (error.name or "").split(".")[0] != "textual":
            raise
        raise Misused("top needs Textual: pip install textual") from None
    from .polling import SlotPolling

    asked = directories_of(directories)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise Misused("top needs a terminal; `slots` prints the same once, `watch` every event")
    polling = SlotPolling(asked)
    try:
        LiveView(polling, interval).run()
    finally:
        polling.close()
    return 0
