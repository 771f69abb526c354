"""The transfer engines that weights can be read with: their modules, packages and libraries.

Known to both ends of a transfer and to ``doctor``.
"""

from __future__ import annotations

from typing import NamedTuple

from .transport_document import MOONCAKE, NIXL


class Engine(NamedTuple):
    name: str
    # Python modules of which the first that can be imported is used.
    modules: tuple[str, ...]
    # What pip installs: for machines without a GPU, and with one (by its CUDA release).
    package: str
    packages_for_gpus: tuple[str, ...]
    # Shared libraries that the modules load and the packages lack: file name -> Debian package.
    libraries: tuple[tuple[str, str], ...]


ENGINES = (
    Engine(
        MOONCAKE,
        ("mooncake.engine",),
        "mooncake-transfer-engine-non-cuda",
        ("mooncake-transfer-engine", "mooncake-transfer-engine-cuda13"),
        (
            ("libibverbs.so.1", "libibverbs1"),
            ("librdmacm.so.1", "librdmacm1"),
            ("libnl-3.so.200", "libnl-3-200"),
            ("libnl-route-3.so.200", "libnl-route-3-200"),
            ("libnuma.so.1", "libnuma1"),
        ),
    ),
    # The package without a suffix imports one of the others.
    Engine(NIXL, ("nixl_cu13", "nixl_cu12"), "nixl-cu12", ("nixl-cu12", "nixl-cu13"), ()),
)


def for_gpus(engine: Engine) -> str:
    """Its packages for machines with a GPU, in words: those of CUDA 12 come first."""
    return " or ".join(engine.packages_for_gpus)


BY_NAME = {engine.name: engine for engine in ENGINES}
