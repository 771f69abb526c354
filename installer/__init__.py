"""Puts the hook into the interpreter that runs this code, and takes it out again.

Behind ``install_sglang_hook_patch.sh`` and ``uninstall_sglang_hook_patch.sh``.  It runs on
the *target* interpreter, any CPython from 3.9 on, with nothing but its standard library: the
target may be offline and may have no pip.  It is not installed itself.

``contents`` knows what is put in, ``target`` what lies there now, ``disk`` how a file gets
in and out, ``liveness`` whether it works; ``command`` is the two scripts.
"""


class Refusal(Exception):
    """Why nothing was done: one sentence for the user, who can act on it."""
