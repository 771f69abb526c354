"""Whether the weights were, all through a read, those that a document describes.

The owner rewrites the slot's header before anything of its own changes a weight, and after.  So
bytes that were read between two looks at it, both ready and of the document's generations, are the
document's.  What SGLang changes without a call that the hook knows is outside of this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

from ..layout.states import READY
from ..reader import Document, Header, HeaderReader, HookError
from .errors import Changed


class Bracket:
    """A document's generations, held against the slot's header."""

    def __init__(self, document: Document, allow: Collection[str] = ()) -> None:
        """Open the header.

        ``allow``: further states than ``ready``; in those the bytes are not whole (``failed`` may
        be half-written) or not there.  Raises HookError, `Changed` where the header is about
        other weights.
        """
        self._document = document
        self._states = {READY, *allow}
        self._known = -1  # the sequence at which the header was found to be the document's
        self._header: HeaderReader = document.slot.open_header()
        try:
            self.check()
        except BaseException:
            self._header.close()
            raise

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """What is read inside is of the document's generations, or `Changed` is raised."""
        self.check()
        try:
            yield
        except HookError:
            self.check()  # what has happened to the weights is the better reason
            raise
        self.check()

    def check(self) -> None:
        """Raises Changed where the weights are no longer the document's."""
        try:
            if not self._header.is_current():  # its owner could not write it, and took it away
                raise HookError(
                    f"{self._header.path} was removed or replaced: its owner has left the slot, or "
                    f"could not write it; read the document again"
                )
            if self._header.sequence == self._known:
                return
            header = self._header.read()
        except HookError as error:
            raise Changed(str(error)) from error
        self._compare(header)
        # Only what was compared is known: it may have been rewritten since.
        self._known = header.sequence

    def _compare(self, header: Header) -> None:
        document = self._document
        name, state = document.slot.name, document.state
        if (header.pid, header.process_start_ticks) != (
            state.get("pid"),
            state.get("process_start_ticks"),
        ) or (document.instance is not None and header.instance != document.instance):
            raise Changed(
                f"slot {name} is another runner's now (pid {header.pid}); read the document again"
            )
        if header.state not in self._states:
            raise Changed(
                f"slot {name} is {header.state}, so its weights are not whole or about to change; "
                f"wait until it is ready and read the document again"
            )
        for what, now, then in (
            ("layout generation", header.layout_generation, document.layout_generation),
            ("content generation", header.content_generation, document.content_generation),
            ("physical epoch", header.physical_epoch, document.physical_epoch),
        ):
            if then is not None and now != then:
                raise Changed(
                    f"the weights of slot {name} have changed since the document was read "
                    f"({what} {then}, now {now}); read it again"
                )

    def close(self) -> None:
        self._header.close()
