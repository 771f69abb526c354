"""``PYTHON -I -B installer install|uninstall ...``, as the two shell scripts call it."""

import os
import sys

# Isolated mode leaves this directory itself in front of sys.path.  What is needed there, for
# the time of one import, is its parent: afterwards the checkout must not be mistaken for
# something that the target has installed.
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[0] = _ROOT

from installer.command import main  # noqa: E402 - only importable from here on

sys.path.remove(_ROOT)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
