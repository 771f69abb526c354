"""The two versioned documents: what they are called, and the kinds of tensors in them.

Their fields are declared in ``state_document.py`` and ``layout_document.py``.
"""

from __future__ import annotations

SCHEMA = "sglang-weight-layout"
STATE_SCHEMA = "sglang-weight-state"
SCHEMA_VERSION = 1

# The kinds of tensors.
PARAMETER, BUFFER, ATTRIBUTE, LORA = "parameter", "buffer", "attribute", "lora"

GIB = 1024.0**3
