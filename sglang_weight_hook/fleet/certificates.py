"""What a failure over TLS means, and so what can be done about it."""

from __future__ import annotations

import http.client
import ssl
from typing import Optional

# What the other side says of a client's certificate that it misses or does not know.
_ALERTS = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED")
# Who refuses a certificate hangs up, and whether the reason arrives before that is chance.
HANG_UPS = (
    ssl.SSLEOFError,
    ConnectionResetError,
    ConnectionAbortedError,
    BrokenPipeError,
    http.client.RemoteDisconnected,
)

# etcd with users takes no certificate that could itself name one, for its gateway would ignore that
# name; it says so in plain text.
ANONYMOUS = (
    "an etcd that has users takes only certificates without a common name (CN); make one with "
    "another subject, such as /O=NAME"
)


def is_about_common_name(answer: bytes) -> bool:
    """Whether etcd's answer with an error is that about a common name."""
    return b"CommonName" in answer[:200]


def advice(error: Optional[BaseException], authorities: str, shown: str) -> Optional[str]:
    """What to do where certificates are, or may be, the reason; None where they are not.

    ``authorities`` and ``shown``: what says whom to trust, and what to show to the other side.

    >>> advice(ssl.SSLError(1, "[SSL: TLSV1_ALERT_UNKNOWN_CA] alert unknown ca"), "--ca", "--cert")
    'only who shows a certificate that is known there is let in; check --cert'
    >>> advice(TimeoutError(), "--ca", "--cert")
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"set {authorities} to the authority of its certificate, or correct the host's name"
    if isinstance(error, HANG_UPS):
        return f"perhaps only who shows a certificate that is known there is let in; check {shown}"
    said = str(error).upper()
    if isinstance(error, ssl.SSLError) and "ALERT" in said and any(x in said for x in _ALERTS):
        return f"only who shows a certificate that is known there is let in; check {shown}"
    return None
