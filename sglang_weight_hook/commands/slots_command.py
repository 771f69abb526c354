"""``sglang-weight-hook slots``: its options and help; the answer is in `slots`."""

from __future__ import annotations

from . import slots as lines
from .app import command
from .options import AllowStaleOption, DirsOption, JsonOption, NoHeadersOption, OutputOption
from .output import asked_form


@command(
    "slots",
    "sglang-weight-hook slots\n"
    "sglang-weight-hook slots --dir '/shared/maps/*'\n"
    "sglang-weight-hook slots -o csv --no-headers",
)
def slots(
    directories: DirsOption = None,
    output: OutputOption = None,
    no_headers: NoHeadersOption = False,
    allow_stale: AllowStaleOption = False,
    as_json: JsonOption = False,
) -> int:
    """List every slot: host, GPU, model, ranks, state, last event.

    A slot whose owner has exited is stale.  `gen` is the layout and the content generation;
    `checked` is how long ago map and memory were last found equal.  Exit status 3 if a slot is
    stale or cannot be read.
    """
    return lines.answer(directories, asked_form(output, as_json, no_headers), allow_stale)
