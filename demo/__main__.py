"""``python3 -m demo``, from the repository root."""

import sys

from demo.demo import main

sys.exit(main())
