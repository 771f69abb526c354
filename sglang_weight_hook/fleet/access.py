"""What lets a reader in: token, certificates, a registry's user; from the environment.

Never from the command line, where every user of the machine could read it.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple, Optional

from ..reader import HookError

TOKEN = "SGLANG_WEIGHT_HOOK_TOKEN"
TOKEN_FILE = "SGLANG_WEIGHT_HOOK_TOKEN_FILE"
CA_FILE = "SGLANG_WEIGHT_HOOK_CA_FILE"
CERT_FILE = "SGLANG_WEIGHT_HOOK_CERT_FILE"
KEY_FILE = "SGLANG_WEIGHT_HOOK_KEY_FILE"
ETCD_USER = "SGLANG_WEIGHT_HOOK_ETCD_USER"
ETCD_PASSWORD = "SGLANG_WEIGHT_HOOK_ETCD_PASSWORD"
ETCD_PASSWORD_FILE = "SGLANG_WEIGHT_HOOK_ETCD_PASSWORD_FILE"

_MOST_BYTES = 4096  # of a token or password
_SECRET = re.compile(r"[\x21-\x7e]+\Z")


class TokenInClear(UserWarning):
    """The token is sent without TLS to another machine."""


class Access(NamedTuple):
    """What a reader shows to agents and to a registry.  Not printed: see `__repr__`."""

    token: Optional[str] = None  # for agents
    ca_file: Optional[str] = None  # PEM; None: what the system trusts
    cert_file: Optional[str] = None  # PEM, of this client, where the other side asks for one
    key_file: Optional[str] = None
    user: Optional[str] = None  # of the registry
    password: Optional[str] = None

    def __repr__(self) -> str:
        shown = ("ca_file", "cert_file", "user")
        return f"<Access {', '.join(f'{name}={getattr(self, name)!r}' for name in shown)}>"


def access_from_environment() -> Access:
    """Raises HookError where a file that is named cannot be read, or a secret is none."""
    get = os.environ.get
    return Access(
        token=_secret(TOKEN, TOKEN_FILE),
        ca_file=get(CA_FILE) or None,
        cert_file=get(CERT_FILE) or None,
        key_file=get(KEY_FILE) or None,
        user=get(ETCD_USER) or None,
        password=_secret(ETCD_PASSWORD, ETCD_PASSWORD_FILE),
    )


def _secret(name: str, file_name: str) -> Optional[str]:
    value, where = os.environ.get(name), name
    path = os.environ.get(file_name)
    if not value and path:
        where = f"{path} ({file_name})"
        try:
            with open(path, encoding="utf-8") as file:
                value = file.read(_MOST_BYTES + 2).strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise HookError(f"{where} cannot be read ({why}); give a file that can") from error
    if not value:
        return None
    if len(value) > _MOST_BYTES or not _SECRET.match(value):
        raise HookError(f"{where} is no token: printable ASCII without spaces, 4096 at most")
    return value
