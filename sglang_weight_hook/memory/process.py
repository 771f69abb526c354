"""The memory of a process on this machine, by process_vm_readv(2).

The owner does nothing for it and notices nothing.  The kernel asks of the reader what it asks of a
debugger (ptrace(2), PTRACE_MODE_ATTACH_REALCREDS): the same user, and no less privileged; or
CAP_SYS_PTRACE.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from ..layout import process
from ..reader import Document, Tensor
from .backend import Run, Span, fetch_one_by_one
from .errors import Changed, NotReadable

NAME = "process"

_RUNS = 1024  # a call takes at most so many (IOV_MAX, limits.h)
_BYTES = 1 << 30  # and moves at most 2 GiB less a page


class ProcessMemory:
    """Reads the memory of the process that published ``document``."""

    name = NAME

    def __init__(self, document: Document) -> None:
        """Find the process, and read a byte of it.  Raises NotReadable and Changed."""
        self._slot = document.slot.name
        self.pid = find_pid(document.state, document.identity)
        self._ticks = document.state.get("process_start_ticks")
        self._call = _process_vm_readv()
        # Stands for the process itself: as long as it lives, its pid is no other one's.
        self._pidfd = _pidfd_of(self.pid)
        try:
            if process.is_running(self.pid, self._ticks) is False:
                raise self._gone()
            first = next((region["ptr"] for region in document.regions), None)
            if first is not None:
                self.fetch([(first, 1)], memoryview(bytearray(1)))
        except BaseException:
            self.close()
            raise

    def reaches(self, tensor: Tensor) -> bool:
        return True

    def view(self, tensor: Tensor) -> None:
        return None

    def fetch(self, runs: Sequence[Run], target: memoryview) -> None:
        start = 0
        for first in range(0, len(runs), _RUNS):
            some = runs[first : first + _RUNS]
            size = sum(length for _, length in some)
            if len(some) == 1 and size > _BYTES:
                address = some[0][0]
                for offset in range(0, size, _BYTES):
                    part = min(_BYTES, size - offset)
                    self._read([(address + offset, part)], target[start + offset :], part)
            else:
                self._read(some, target[start:], size)
            start += size
        if not self._is_there():
            raise self._gone()

    def fetch_at(self, spans: Sequence[Span], target: memoryview) -> None:
        fetch_one_by_one(self, spans, target)

    def buffer(self, size: int) -> memoryview:
        return memoryview(bytearray(size))

    def _read(self, runs: Sequence[Run], target: memoryview, size: int) -> None:
        if not size:
            return
        remote = array("Q", [number for run in runs for number in run])
        local = array("Q", [_address_of(target), size])
        got = self._call(
            ctypes.c_int(self.pid),
            ctypes.c_void_p(local.buffer_info()[0]),
            ctypes.c_ulong(1),
            ctypes.c_void_p(remote.buffer_info()[0]),
            ctypes.c_ulong(len(runs)),
            ctypes.c_ulong(0),
        )
        if got == size:
            return
        code = ctypes.get_errno() if got < 0 else errno.EFAULT
        if code == errno.ESRCH:
            raise self._gone()
        if code == errno.EFAULT:  # also where only a part of it could be read
            raise Changed(
                f"slot {self._slot} has no memory at {runs[0][0]:#x} any more; read the document "
                f"again"
            )
        if code in (errno.EPERM, errno.EACCES):
            raise NotReadable(refusal(self.pid))
        raise NotReadable(f"process {self.pid} cannot be read: {os.strerror(code)}")

    def _is_there(self) -> bool:
        if self._pidfd is None:
            return process.is_running(self.pid, self._ticks) is not False
        try:
            signal.pidfd_send_signal(self._pidfd, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True

    def _gone(self) -> Changed:
        return Changed(
            f"the owner of slot {self._slot} (pid {self.pid}) has exited, and its memory with it; "
            f"start the server again"
        )

    def close(self) -> None:
        descriptor, self._pidfd = self._pidfd, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def refusal(pid: int) -> str:
    """Why the kernel refuses to read ``pid``, and what to do: one sentence."""
    mine, theirs = os.geteuid(), _user_of(pid)
    if theirs is not None and mine not in (0, theirs):
        return (
            f"the kernel refuses to read process {pid}: it is user {theirs}'s and this is user "
            f"{mine}; read as that user, or as root with CAP_SYS_PTRACE"
        )
    scope = _number_in("/proc/sys/kernel/yama/ptrace_scope")
    if scope in (1, 2, 3) and not _has_ptrace():
        return (
            f"the kernel refuses to read process {pid}: kernel.yama.ptrace_scope is {scope}; read "
            f"with CAP_SYS_PTRACE, or start the server with SGLANG_WEIGHT_HOOK_SHARE=1"
        )
    if not _has_ptrace():
        return (
            f"the kernel refuses to read process {pid}: it has capabilities that this process "
            f"lacks, or is not dumpable; read with CAP_SYS_PTRACE (docker run "
            f"--cap-add SYS_PTRACE), or start the server with SGLANG_WEIGHT_HOOK_SHARE=1"
        )
    return (
        f"the kernel refuses to read process {pid}: a security module or a user namespace forbids "
        f"it; read from the server's container, or start it with SGLANG_WEIGHT_HOOK_SHARE=1"
    )


# --- finding the process ------------------------------------------------------------------


def find_pid(state: Mapping[str, Any], identity: Mapping[str, Any]) -> int:
    """The owner's pid as it is called here.  Raises NotReadable.

    In a pid namespace inside ours it has another number than the one it knows itself
    (``NSpid`` in /proc/PID/status, proc(5)).
    """
    pid, ticks = int(state["pid"]), state.get("process_start_ticks")
    boot = state.get("boot_id")
    if boot is not None and boot != process.boot_id():
        raise NotReadable(
            f"the server runs on another machine ({state.get('hostname')}): its memory cannot be "
            f"read from here; read on that machine, or through a transfer engine"
        )
    namespace = identity.get("pid_namespace")
    if namespace is None or namespace == process.pid_namespace():
        return pid
    for name in os.listdir("/proc"):
        if name.isdigit() and _inner_pid(name) == pid and process.start_ticks(int(name)) == ticks:
            found = _link(f"/proc/{name}/ns/pid")
            if found is None or found == namespace:
                return int(name)
    raise NotReadable(
        f"the server's process {pid} is in another pid namespace and not in sight from here; read "
        f"in its container, or share the pid namespace (docker run --pid, Kubernetes "
        f"shareProcessNamespace)"
    )


def _inner_pid(name: str) -> Optional[int]:
    """The pid that a process has in its own, innermost namespace."""
    try:
        with open(f"/proc/{name}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("NSpid:"):
                    return int(line.split()[-1])
    except (OSError, ValueError):
        pass
    return None


def _link(path: str) -> Optional[str]:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _pidfd_of(pid: int) -> Optional[int]:
    try:
        return os.pidfd_open(pid)  # Linux 5.3
    except (OSError, AttributeError):
        return None


def _user_of(pid: int) -> Optional[int]:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def _number_in(path: str) -> Optional[int]:
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def _has_ptrace() -> bool:
    """Whether this process has CAP_SYS_PTRACE (number 19, capabilities(7))."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("CapEff:"):
                    return bool(int(line.split()[1], 16) >> 19 & 1)
    except (OSError, ValueError):
        pass
    return False


# --- the call -----------------------------------------------------------------------------


def _process_vm_readv() -> Any:
    try:
        call = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except (OSError, AttributeError):
        raise NotReadable(
            "this system has no process_vm_readv, which Linux has; read on the server's machine"
        ) from None
    call.restype = ctypes.c_ssize_t
    return call


def _address_of(target: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(target))
