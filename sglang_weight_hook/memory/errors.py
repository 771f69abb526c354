"""Why bytes were not handed out."""

from __future__ import annotations

from ..reader.errors import HookError, Stale


class Changed(Stale):
    """The weights are no longer those that the document describes: read the document again.

    An update or a release has begun, is under way or has ended since; or the owner has exited.
    What was read meanwhile has been thrown away.
    """


class NotReadable(HookError):
    """The memory cannot be reached from here; the message says what is missing."""


class TransferWarning(UserWarning):
    """A transfer will be slow, or is not needed; said before it begins."""
