"""Limits of what an owner hands over its control socket, known to both sides."""

from __future__ import annotations

# A copy: at most so many bytes and so many runs a request, which is one line of 4,096 bytes.
COPY_BYTES = 4 << 20
COPY_RUNS = 64
# Allocations that one answer hands over.
SHARED_ALLOCATIONS = 32

# How the memory of an allocation can be opened by another process: the words of `export`.
# cudaIpcGetMemHandle; a file descriptor or a fabric handle of memory mapped with cuMemMap; not.
LEGACY_IPC, POSIX_FD, FABRIC, NO_EXPORT = "legacy_ipc", "posix_fd", "fabric", "none"
# After which a connection on which nothing is said is closed.
IDLE_SECONDS = 30.0
