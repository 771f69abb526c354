"""Whether the weights were, all through a read, those that a document describes.

The owner rewrites the slot's header before anything of its own changes a weight, and after.  So
bytes that were read between two looks at it, both ready and of the document's generations, are the
document's.  What SGLang changes without a call that the hook knows is outside of this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Optional, Protocol

from ..layout.states import READY
from ..reader import Document, Header, HookError
from .errors import Changed


class HeaderSource(Protocol):
    """Where the header is looked at: in its file, or by an engine in the owner's memory."""

    # Whether a look before each read costs next to nothing.  Where it is a transfer of its own, the
    # look after the last read stands for it, and nothing may have been published in between.
    is_cheap: bool

    def look(self, known: int) -> Optional[Header]:
        """The header; None where its sequence is still ``known``.

        Raises `Changed` where it is not this slot's any more, `NotReadable` where it cannot be had.
        """

    def close(self) -> None:
        """Let go of it; called once."""


class HeaderFile:
    """The header in the output directory."""

    is_cheap = True

    def __init__(self, document: Document) -> None:
        """Open it.  Raises HookError."""
        self._header = document.slot.open_header()

    def look(self, known: int) -> Optional[Header]:
        try:
            if not self._header.is_current():  # its owner could not write it, and took it away
                raise HookError(
                    f"{self._header.path} was removed or replaced: its owner has left the slot, or "
                    f"could not write it; read the document again"
                )
            return None if self._header.sequence == known else self._header.read()
        except HookError as error:
            raise Changed(str(error)) from error

    def close(self) -> None:
        self._header.close()


class Bracket:
    """A document's generations, held against the slot's header."""

    def __init__(
        self,
        document: Document,
        allow: Collection[str] = (),
        header: Optional[HeaderSource] = None,
    ) -> None:
        """Look for the first time.

        ``allow``: further states than ``ready``; in those the bytes are not whole (``failed`` may
        be half-written) or not there.  ``header``: where to look, and who closes it; None: in its
        file.  Raises HookError, `Changed` where the header is about other weights.
        """
        self._document = document
        self._states = {READY, *allow}
        self._known = -1  # the sequence at which the header was found to be the document's
        self._published: Optional[float] = None  # when the state was that was seen last
        self._closes = header is None
        self._header: HeaderSource = HeaderFile(document) if header is None else header
        try:
            self.check()
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """What is read inside is of the document's generations, or `Changed` is raised."""
        if self._header.is_cheap:
            self.check()
        try:
            yield
        except HookError as error:
            try:
                self.check()  # what has happened to the weights is the better reason
            except Changed:
                raise
            except HookError:
                pass  # nor can the header be read
            raise error
        self.check()

    def check(self) -> None:
        """Raises Changed where the weights are no longer the document's."""
        header = self._header.look(self._known)
        if header is None:
            return
        self._compare(header)
        # Only what was compared is known: it may have been rewritten since.
        self._known, self._published = header.sequence, header.updated_at

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
        if not self._header.is_cheap and self._published not in (None, header.updated_at):
            raise Changed(
                f"an event of slot {name} has come and gone meanwhile, and the weights are of the "
                f"same generations again; read the document again"
            )

    def close(self) -> None:
        if self._closes:
            self._header.close()
