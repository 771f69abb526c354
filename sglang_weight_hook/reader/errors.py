"""The exceptions of the reading half: `HookError`, and what a caller may want to tell apart."""

from __future__ import annotations


class HookError(Exception):
    """Anything that keeps a map from being read; the message says what to do about it."""


class Stale(HookError):
    """What was asked for is not true any more, or not at the moment: look again before acting."""


class Unreachable(HookError):
    """A node agent or a registry did not answer: what it knows is unknown, and so not good."""


class ControlError(HookError):
    """The owner of a slot could not be asked, or has no answer that can be relied on."""


class NoSocket(ControlError):
    """The owner lives and has no control socket, for example because its checks are off."""


class NotAllowed(ControlError):
    """The control socket is another user's."""


class OwnerGone(ControlError, Stale):
    """The process that published the slot has exited, or publishes that slot no more."""


class NotReady(Stale):
    """The slot is in another state than ``ready``: its weights are not whole, or not there."""


class Busy(ControlError):
    """Weights are changing now, so there is nothing to be compared: ask again."""


class NoAnswer(ControlError):
    """No answer came in time: the owner is stopped (SIGSTOP), or was busy all along."""


# Said of a file that has not the format.
FOREIGN = "it was not written by the hook"
