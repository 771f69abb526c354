"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from ..layout import location
from .render.output import FORMS
from .slot_choice import a_slot_or_file_named, one_of

DirOption = Annotated[
    Optional[str],
    typer.Option(
        "--dir",
        metavar="DIR",
        help=f"The server's output directory, or the URL of a node agent (https://node:7411) or of "
        f"a registry of agents (etcd://host:2379).  [default: ${location.DIRECTORY}, else "
        f"./{location.DEFAULT_DIRECTORY}]",
    ),
]
DirsOption = Annotated[
    Optional[list[str]],
    typer.Option(
        "--dir",
        metavar="DIR",
        help="A server's output directory, a pattern such as '/shared/maps/*', or the URL of a "
        "node agent (https://node:7411) or of a registry of agents (etcd://host:2379); "
        "repeatable.  "
        f"[default: ${location.DIRECTORY}, else ./{location.DEFAULT_DIRECTORY}]",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON; all sizes are in bytes.")]
OutputOption = Annotated[
    Optional[str],
    typer.Option(
        "-o",
        "--output",
        metavar="FORM",
        autocompletion=one_of(FORMS),
        help=f"{', '.join(FORMS)}.  wide: a table with all columns; csv, tsv and parquet have "
        "sizes and addresses as numbers, in bytes.  [default: table]",
    ),
]
NoHeadersOption = Annotated[
    bool, typer.Option("--no-headers", help="Leave out the line with the columns' names.")
]
AllowStaleOption = Annotated[
    bool,
    typer.Option(
        "--allow-stale",
        help="Exit with 0 also if a slot's owner has exited or its state is not ready (for "
        "post-mortems); default: 3.",
    ),
]
SlotArgument = Annotated[
    Optional[str],
    typer.Argument(
        metavar="SLOT",
        show_default=False,
        help="A slot (0, 0_draft, ...) or a saved layout file; default: the only slot.",
        autocompletion=a_slot_or_file_named,
    ),
]
MatchOption = Annotated[
    Optional[str],
    typer.Option(
        "--match",
        help="Only tensors with TEXT in a name or alias; with *, ? or [ in it, TEXT is a pattern "
        "for the whole name.",
        metavar="TEXT",
    ),
]
ViaOption = Annotated[
    Optional[str],
    typer.Option(
        "--via",
        metavar="WAY",
        autocompletion=one_of(("process", "cuda", "owner", "mooncake", "nixl")),
        help="How to reach the server's memory: process (a CPU server's, by the kernel), cuda (a "
        "GPU's, opened here), owner (the server copies it; needs SGLANG_WEIGHT_HOOK_SHARE=1), or "
        "from another machine mooncake or nixl (through SGLANG_WEIGHT_HOOK_SUBSCRIBERS of the "
        "same name); default: the first that works.",
    ),
]
AddressOption = Annotated[
    Optional[str],
    typer.Option(
        "--address",
        metavar="HOST[:PORT]",
        help="With --via mooncake: where the server's mooncake is reached, instead of where it has "
        "published.",
    ),
]
