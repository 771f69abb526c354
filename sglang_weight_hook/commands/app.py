"""The command ``sglang-weight-hook``: the reader's answers, for people and for scripts.

Exit status of every command: 0, or 1 with one sentence on stderr if there is no answer, 2 for
wrong usage, and 3 for an answer that a script has to act on (``diff``: register again;
``verify``, ``doctor``: something is wrong; ``lookup``: no tensor at the address;
``watch --timeout``: too few events).
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .. import __version__
from ..reader import HookError
from ..reader.errors import Stale
from .render.text import complain

NO_ANSWER, USAGE, ACT = 1, 2, 3


class Misused(Exception):
    """Wrong usage; the message says what is right."""


app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: the same in a terminal, a pipe and a log
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Show and check the published addresses of a running SGLang's weights.",
    epilog=(
        "Exit status: 0 done; 1 no answer, stderr says why; 2 wrong usage; 3 an answer to act "
        "on (see the command's help).  A SLOT is one model runner: 0, 1, 0_draft, ...  A command "
        "that takes one slot needs no name if there is only one, and accepts a saved copy of a "
        "weight_layout_SLOT.json instead."
    ),
)


def main() -> int:
    """Run the command line; the exit status."""
    for stream in (sys.stdout, sys.stderr):
        # Names that the terminal's encoding lacks are shown with escapes, not with a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    invoked = os.path.basename(sys.argv[0])
    name = "python -m sglang_weight_hook" if invoked == "__main__.py" else "sglang-weight-hook"
    if name != "sglang-weight-hook" and {"--install-completion", "--show-completion"} & {
        argument.partition("=")[0] for argument in sys.argv[1:]
    }:
        # It would complete `python` itself, with a name that no shell takes for a variable.
        complain(
            "a shell completes the command sglang-weight-hook, and not python -m; `pip install .` "
            "in the hook's checkout installs it"
        )
        return USAGE
    try:
        app(prog_name=name)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    return 0


def command(name: str, show: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a command: its examples go into its help, its errors become one sentence."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            warnings.showwarning = _show_warning
            try:
                status = function(*args, **kwargs) or 0
                sys.stdout.flush()
            except Misused as error:
                complain(str(error))
                status = USAGE
            except Stale as error:
                complain(str(error))
                status = ACT
            except HookError as error:
                complain(str(error))
                status = NO_ANSWER
            except BrokenPipeError:
                # The reader of the pipe (`head`) has closed it.  What Python still flushes at
                # exit needs a valid descriptor.
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                status = 0
            except OSError as error:
                where = f" ({error.filename})" if error.filename else ""
                complain(f"{error.strerror or error}{where}; give another path")
                status = NO_ANSWER
            except KeyboardInterrupt:
                status = 130
            raise typer.Exit(status)

        text = (function.__doc__ or "").strip()
        body = "\n".join(line.strip() for line in text.splitlines())
        run.__doc__ = (
            body + "\n\n\b\nExamples:\n" + "\n".join("  " + line for line in show.split("\n"))
        )
        app.command(name)(run)
        return run

    return register


def _show_warning(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
    """As one sentence, where it is said to people and not to programmers."""
    if issubclass(category, UserWarning):
        complain(str(message))
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *where[:2]))


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        sys.stdout.write(f"sglang-weight-hook {__version__}\n")
        raise typer.Exit(0)
