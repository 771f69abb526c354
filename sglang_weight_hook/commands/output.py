"""What ``--output``, ``--json`` and ``--no-headers`` ask for, or wrong usage."""

from __future__ import annotations

from typing import Optional

from .app import Misused
from .render.output import Form, Unwritable, form_of


def asked_form(output: Optional[str], as_json: bool, no_headers: bool) -> Form:
    """Raises Misused."""
    try:
        return form_of(output, as_json, no_headers)
    except Unwritable as error:
        raise Misused(str(error)) from None
