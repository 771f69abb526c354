"""Activates the hook in this Python; ``launch_wrapper.py`` puts it in front of PYTHONPATH.

Python imports the first ``sitecustomize`` on ``sys.path`` when it starts.  Where the machine or
the user has one too, that is the one to see: it is imported from here, and takes our place.

Rules as in ``sglang_patch_loader``: imports nothing that is not there at start-up, prints
nothing, never raises of itself.  Written so that any Python can read it (no annotations),
because a server's children may be of any: there it makes way for the other one, and that is all.
"""

import os
import sys

HERE = os.path.dirname(__file__)
CHECKOUT = os.path.dirname(HERE)
OURS = ("sglang_patch_loader", "sglang_weight_hook_patch_core", "sglang_weight_hook")


class Checkout:
    """Finds the hook's modules in the checkout, and nothing else of what lies there.

    Last on ``sys.meta_path``: where the hook is installed as well, the installed one counts,
    all of it.
    """

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in OURS:
            return None
        # importlib.machinery's, without importing that.
        finder = sys.modules["_frozen_importlib_external"].PathFinder
        return finder.find_spec(name, [CHECKOUT])


def activate():
    sys.meta_path.append(Checkout)
    import sglang_patch_loader

    sglang_patch_loader.install()


def give_way():
    """Import the ``sitecustomize`` behind ours, as if ours were not there.

    If there is none, or it fails, `site` gets the same exception as without us: it ignores a
    missing one and reports a failing one.
    """
    places = [place for place in sys.path if place != HERE]
    with_ours, sys.path[:] = list(sys.path), places
    # Python 2 empties a module that nobody holds any more; we still need our names.
    this = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # noqa: F401
    finally:
        # On sys.path it stays, for those who make a child's PYTHONPATH out of that.
        if sys.path == places:
            sys.path[:] = with_ours
        elif HERE not in sys.path:
            sys.path.insert(0, HERE)
        del this


try:
    if sys.version_info >= (3, 9):  # noqa: UP036 - a child may be of an older Python
        activate()
except Exception:
    pass
give_way()
