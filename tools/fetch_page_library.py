"""Fetches the library that the page of ``plot`` is drawn with, and checks that it is that one.

``python -m tools.fetch_page_library`` replaces the files in the package by those of the version
below; ``--check`` compares them and changes nothing.  From the registry that npm is configured
for, by ``npm pack``.  Anything but the expected bytes is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

NAME, VERSION = "d3-hierarchy", "3.1.2"
ARCHIVE_SHA256 = "7681875f06440c088afda1fd834d853dd560166c945e731382ee0c636332360b"
FILES = {
    "package/dist/d3-hierarchy.min.js": "page_d3_hierarchy.js",
    "package/LICENSE": "page_d3_hierarchy.license.txt",
}
RENDER = Path(__file__).parent.parent / "sglang_weight_hook" / "commands" / "render"


def archive() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", f"{NAME}@{VERSION}"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (packed,) = Path(folder).glob("*.tgz")
        return packed.read_bytes()


def contents(data: bytes) -> dict[str, bytes]:
    """The files that the package carries, by the names they have there.  Raises ValueError."""
    digest = hashlib.sha256(data).hexdigest()
    if digest != ARCHIVE_SHA256:
        raise ValueError(f"{NAME} {VERSION} has SHA-256 {digest}, not {ARCHIVE_SHA256}")
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as packed:
        for member, name in FILES.items():
            file = packed.extractfile(member)
            if file is None:
                raise ValueError(f"{member} is no file in {NAME} {VERSION}")
            found[name] = file.read()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, and change nothing")
    check = parser.parse_args().check
    differs = 0
    for name, content in contents(archive()).items():
        path = RENDER / name
        if path.exists() and path.read_bytes() == content:
            continue
        differs = 1
        print(f"{path.name} differs from {NAME} {VERSION}", file=sys.stderr)
        if not check:
            path.write_bytes(content)
    return differs if check else 0


if __name__ == "__main__":
    sys.exit(main())
