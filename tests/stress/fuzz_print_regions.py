"""The C example under the address and undefined behaviour sanitizers, on files with any change.

    make fuzz-c                     # 170 seconds; SECONDS=30 for another time
    python -m tests.stress.fuzz_print_regions --seconds 30
    python -m tests.stress.fuzz_print_regions --seed 7 --case 123    # that one again

Each case is a directory: saved and made-up documents of a living owner (this process), of which
some are changed: as JSON (a value, a key, nesting), as bytes, or by something else in their
place (a pipe, a device, a link, a file of 100 GB); the same for locks and the header.  A case
follows from its seed and number alone.

What is wrong: a sanitizer's report, an exit status that is not documented, more or less than one
sentence on stderr, 8 seconds without an end.  Where regions are printed, the Python reader has to
find the owner alive, and the same regions.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from sglang_weight_hook import reader
from sglang_weight_hook.layout import files, process
from sglang_weight_hook.layout.header import CODES, Header, pack
from tests.stress.processes import ROOT
from tests.stress.untrusted_documents import VALUES, corrupt, spoil

SAVED = ROOT / "tests" / "compatibility" / "documents_0_1"
SOURCE = ROOT / "examples" / "print_regions.c"
HANGS_AFTER = 8  # seconds, on a machine that is busy with other work
HUGE = 100 * 1024**3

# So that a refusal after a wait takes no seconds.
PATIENCE = {
    "#define LOCK_PATIENCE_MS 10000": "#define LOCK_PATIENCE_MS 60",
    "#define READ_PATIENCE_MS 2000": "#define READ_PATIENCE_MS 60",
    "#define HEADER_ATTEMPTS 1100": "#define HEADER_ATTEMPTS 120",
}
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-g", "-fno-omit-frame-pointer"]

# Of as many characters in every run, so that a change by position is the same one again; what
# they stand for is put in afterwards.
PID, TICKS, BOOT, HOST, NAMESPACE = 8111111118, 8222222228, "b" * 36, "h" * 12, "pid:[8333333338]"
REAL = process.identity()
STANDS_FOR = {
    str(PID): str(REAL["pid"]),
    str(TICKS): str(REAL["process_start_ticks"]),
    BOOT: str(REAL["boot_id"]),
    HOST: socket.gethostname(),
    NAMESPACE: str(REAL["pid_namespace"]),
}
TOKENS = (
    b'"', b"\\", b"\\u", b"\\u00", b"\\ud800", b"{", b"}", b"[", b"]", b",", b":", b"null", b"true",
    b"NaN", b"-", b"0", b"00", b"1e", b"1.", b"18446744073709551615", b"18446744073709551616",
    b"\0", b"\n", b"\x1f", b"\x7f", b"\x80", b"\xc3", b"\xe0\x9f", b"\xed\xa0\x80", b"\xf4\x90",
    b"\xff", b'"ptr":', b'"regions":[', b'"identity":{', b'"pid":', b'"schema":', b'"size":0',
)  # fmt: skip
NUMBERS = (0, 1, 2, 127, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


@dataclasses.dataclass
class Run:
    status: Optional[int]
    out: str
    err: str


# --- the program -------------------------------------------------------------------------------


def compiler() -> Optional[str]:
    """A C compiler that has the sanitizers' libraries."""
    for name in ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found is not None:
            probe = [found, *SANITIZERS, "-x", "c", "-o", os.devnull, "-"]
            code = b"int main(void) { return 0; }"
            if not subprocess.run(probe, input=code, capture_output=True, check=False).returncode:
                return found
    return None


def build(folder: Path, source: str, cc: str) -> Path:
    for old, new in PATIENCE.items():
        if source.count(old) != 1:
            raise RuntimeError(f"{SOURCE.name} has no line {old!r} any more; change PATIENCE")
        source = source.replace(old, new)
    (folder / "print_regions.c").write_text(source)
    program = folder / "print_regions"
    command = [cc, *FLAGS, *SANITIZERS, "-o", str(program), str(folder / "print_regions.c")]
    subprocess.run(command, check=True)
    return program


# --- the documents -----------------------------------------------------------------------------


def owned(state: dict[str, Any], layout: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two documents in the name of the process that runs this."""
    who = {"pid": PID, "process_start_ticks": TICKS, "boot_id": BOOT, "hostname": HOST}
    state.update(who)
    layout["identity"].update(who, pid_namespace=NAMESPACE)
    return state, layout


def saved_documents() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    names = files.STATE.format("0"), files.LAYOUT.format("0")
    found = []
    for folder in sorted(SAVED.iterdir()):
        state, layout = (json.loads((folder / name).read_bytes()) for name in names)
        found.append(owned(state, layout))
    return found


def made_up_documents() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Of a GPU: of few regions and of many, with the fields of today's release."""
    found = []
    for count in (0, 1, 3, 40):
        regions = [
            {"ptr": 0x7F20_0000_0000 + (number << 21), "size": 4096 + number, "device": "cuda:0",
             "allocation_ptr": 0x7F20_0000_0000, "allocation_size": count << 21,
             "allocation_source": "driver", "tensors": [f"layers.{number}.w", "é \"\\ \n"]}
            for number in range(count)
        ]  # fmt: skip
        common = {"schema_version": 1, "state": "ready", "instance": "d41f0c9a5b7e2386",
                  "layout_generation": 2, "content_generation": 5}  # fmt: skip
        state = {"schema": "sglang-weight-state", **common, "event": {"kind": "load"},
                 "problem": None, "control": "weight_hook_7.sock"}  # fmt: skip
        layout = {"schema": "sglang-weight-layout", **common, "identity": {"gpu_id": 0},
                  "tensors": {"w": {"ptr": 1, "shape": [1, 2]}}, "regions": regions,
                  "totals": {}, "checksums": None}  # fmt: skip
        found.append(owned(state, layout))
    return found


def a_header(rng: random.Random) -> bytes:
    def number(bits: int) -> int:
        return rng.choice(NUMBERS) % 2**bits if rng.random() < 0.5 else rng.getrandbits(bits)

    return pack(
        Header(
            rng.choice((0, 1, 2, 4, 2**63)), number(32), rng.choice(CODES), number(64),
            f"{rng.getrandbits(128):032x}", number(64), number(64), number(64), number(64),
            float(number(32)), float(number(32)), f"{rng.getrandbits(128):032x}",
            f"{rng.getrandbits(64):016x}",
        )
    )  # fmt: skip


# --- the changes -------------------------------------------------------------------------------


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    for _ in range(1 + rng.randrange(4)):
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.randrange(1, 40))
        way = rng.randrange(7)
        if way == 0:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif way == 1 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif way == 2:
            data = data[:at] + rng.choice(TOKENS) + data[at:]
        elif way == 3:
            data = data[:at] + rng.choice(TOKENS) + data[to:]
        elif way == 4:
            data = data[:at] + data[to:]
        elif way == 5:
            data = data[:to] + data[at:]
        else:
            data = spoil(data, rng.randrange) if rng.random() < 0.2 else data[:at]
    return data


def changed_regions(layout: dict[str, Any], rng: random.Random) -> None:
    """What is printed, and what is next to it."""
    regions = layout.get("regions")
    if not isinstance(regions, list) or not regions:
        return
    region = rng.choice(regions)
    name = rng.choice(("ptr", "size", "device", "allocation_ptr", "allocation_size", "tensors"))
    region[name] = rng.choice(NUMBERS) if rng.random() < 0.5 else rng.choice(VALUES)


def in_its_place(path: Path, rng: random.Random) -> None:
    """Something else under the file's name, or nothing."""
    way = rng.randrange(9)
    data = path.read_bytes()
    path.unlink()
    if way == 0:
        os.mkfifo(path)
    elif way == 1:
        path.mkdir()
    elif way == 2:
        path.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/dev/full", "/dev/urandom")))
    elif way == 3:
        path.symlink_to(rng.choice((path.name, "nowhere", ".", "elsewhere")))
        (path.parent / "elsewhere").write_bytes(data)
    elif way == 4:
        path.write_bytes(data)
        os.truncate(path, HUGE)
    elif way == 5:
        path.write_bytes(b"")
    elif way == 6:
        path.write_bytes(rng.randbytes(rng.choice((1, 127, 128, 129, 5000))))
    elif way == 7:
        with socket.socket(socket.AF_UNIX) as listening, contextlib.suppress(OSError):
            listening.bind(str(path))


class Case:
    """A directory, and how the program is started on it."""

    NAMES = ("weight_state_0.json", "weight_layout_0.json", "weight_saving_0.lock",
             "weight_owner_0.lock", "weight_header_0.bin")  # fmt: skip

    def __init__(self, seed: int, number: int, folder: Path) -> None:
        self.rng = rng = random.Random(f"{seed}:{number}")
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        every = saved_documents() if rng.random() < 0.4 else made_up_documents()
        self.header = rng.random() < 0.25
        self.options = []
        self.during: Optional[Callable[[], None]] = None
        documents = self.documents(*rng.choice(every))
        for name, data in zip(self.NAMES, (*documents, b"", b"", self.header_bytes())):
            (folder / name).write_bytes(data)
        self.owner_is_held = rng.random() < 0.95
        self.saving_is_held = rng.random() < 0.02
        # Opened before something else takes their place.
        self.locks = [os.open(folder / name, os.O_RDONLY) for name in self.NAMES[2:4]]
        if rng.random() < 0.2:
            in_its_place(folder / rng.choice(self.NAMES), rng)
        if self.header:
            self.options = self.header_options()
        self.arguments = [*self.options, str(folder), "0"]
        if rng.random() < 0.03:
            slot = rng.choice(("../0", "%s%n" * 9, "0" * 5000, ""))
            odd = (("--header=x", str(folder), "0"), (), ("x",), (str(folder), slot))
            self.arguments = list(rng.choice(odd))

    def documents(self, state: dict[str, Any], layout: dict[str, Any]) -> tuple[bytes, bytes]:
        rng = self.rng
        way = rng.randrange(10)
        if way < 3:
            changed_regions(layout, rng)
        elif way < 6:
            corrupt(layout if rng.random() < 0.6 else state, rng.randrange)
        texts = [json.dumps(state, indent=2).encode()]
        texts += [json.dumps(layout, ensure_ascii=rng.random() < 0.5).encode("utf-8", "replace")]
        if way in (6, 7, 8):
            which = int(rng.random() < 0.6)
            texts[which] = changed_bytes(texts[which], rng)
        for old, new in STANDS_FOR.items():
            texts = [text.replace(old.encode(), new.encode()) for text in texts]
        return texts[0], texts[1]

    def header_bytes(self) -> bytes:
        data = a_header(self.rng)
        return data if self.rng.random() < 0.5 else changed_bytes(data, self.rng)

    def header_options(self) -> list[str]:
        """Sometimes with another header in its place, one that is cut short, and then none."""
        path, data, rng = self.folder / self.NAMES[4], self.header_bytes(), self.rng
        if rng.random() < 0.6 or not path.is_file() or path.is_symlink():
            return [rng.choice(("--header", "--header=1"))]
        pauses = [rng.random() * 0.05 for _ in range(3)]
        length = rng.choice((0, 0, 1, 64, 127))

        def during() -> None:
            time.sleep(pauses[0])
            (self.folder / "new").write_bytes(data)
            os.replace(self.folder / "new", path)
            time.sleep(pauses[1])
            os.truncate(path, length)
            time.sleep(pauses[2])
            path.unlink()

        self.during = during
        return [f"--header={rng.choice((2, 3, 999999999))}"]

    def run(self, program: Path) -> Run:
        options = "exitcode=99:detect_leaks=1:hard_rss_limit_mb=2000:allocator_may_return_null=1"
        for lock, wanted in zip(self.locks, (self.saving_is_held, self.owner_is_held)):
            if wanted:
                fcntl.flock(lock, fcntl.LOCK_EX)
        child = subprocess.Popen(
            [str(program), *self.arguments],
            env={"ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            if self.during is not None:
                self.during()
            out, err = child.communicate(timeout=HANGS_AFTER)
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
            return Run(None, "", err.decode("utf-8", "replace"))
        finally:
            if child.poll() is None:
                child.kill()
        return Run(child.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))

    def close(self) -> None:
        for lock in self.locks:
            os.close(lock)

    def wrong(self, run: Run) -> Optional[str]:
        """What is wrong with how it ended."""
        if run.status is None:
            return f"no end after {HANGS_AFTER} s"
        if "Sanitizer" in run.err or "runtime error" in run.err:
            return "a sanitizer's report"
        if run.status not in (0, 1, 2, 3):
            return f"exit status {run.status}"
        lines = run.err.splitlines()
        uncertain = "print_regions: whether the owner of slot 0 lives is not certain: "
        starts = ("print_regions: ", "usage: ") if run.status else (uncertain,)
        if (
            len(lines) > 1
            or len(lines) < bool(run.status)
            or not all(line.startswith(starts) for line in lines)
        ):
            return f"status {run.status} and {lines} on stderr"
        if self.header:
            shape = r"[a-z]+( \d+){5}( \d+\.\d{9}){2} [0-9a-f]{16}"
            return next((f"line {line!r}" for line in run.out.splitlines()
                         if not re.fullmatch(shape, line)), None)  # fmt: skip
        if run.status:
            return "output of a refused document" if run.out else None
        return self.disagreement(run)

    def disagreement(self, run: Run) -> Optional[str]:
        """Where the Python reader has another opinion of what was printed."""
        slot = reader.Slot(str(self.folder), "0")
        try:
            found, document = slot.liveness(), slot.read(timeout=0)
        except reader.HookError as error:
            return f"an answer, where the Python reader has none: {error}"
        if not found.alive:
            return f"an answer of an owner that has exited: {found.why}"
        fields = ("ptr", "size", "device", "allocation_ptr", "allocation_size")
        lines = [
            " ".join(str(region.get(field, 0)) for field in fields) for region in document.regions
        ]
        return None if run.out.splitlines() == lines else "other regions than in the document"


# --- many of them ------------------------------------------------------------------------------


class Fuzzing:
    """Cases one after the other, in some threads, until the time is over or one is wrong."""

    def __init__(self, program: Path, folder: Path, seed: int) -> None:
        self.program, self.folder, self.seed = program, folder, seed
        self.seen: Counter[str] = Counter()
        self.failure: Optional[str] = None
        self._next = 0
        self._lock = threading.Lock()

    def run(self, seconds: float, threads: int = 4) -> None:
        deadline = time.monotonic() + seconds

        def work(thread: int) -> None:
            while time.monotonic() < deadline and self.failure is None:
                with self._lock:
                    number, self._next = self._next, self._next + 1
                try:
                    self.one(number, self.folder / str(thread))
                except Exception as error:
                    self.failure = f"case {number} could not be run: {error!r}"
                    raise

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def one(self, number: int, folder: Path) -> Run:
        case = Case(self.seed, number, folder)
        try:
            run = case.run(self.program)
            wrong = case.wrong(run)
        finally:
            case.close()
        with self._lock:
            self.seen[f"{'header' if case.header else 'regions'}: exit {run.status}"] += 1
            if wrong is not None and self.failure is None:
                kept = self.folder / "failed"
                shutil.rmtree(kept, ignore_errors=True)
                os.rename(folder, kept)
                self.failure = (
                    f"seed {self.seed}, case {number}: {wrong}\n"
                    f"arguments {case.arguments[:-2]}; its files are in {kept}\n{run.err[-6000:]}"
                )
        return run


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz examples/print_regions.c with sanitizers.")
    parser.add_argument("--seconds", type=float, default=170, help="how long (170)")
    parser.add_argument("--seed", type=int, help="of the changes; chosen at random without it")
    parser.add_argument("--case", type=int, help="run only the case of that number")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    cc = compiler()
    if cc is None:
        print("there is no C compiler with the address sanitizer here", file=sys.stderr)
        return 1
    folder = Path(tempfile.mkdtemp(prefix="fuzz_c_"))
    fuzzing = Fuzzing(build(folder, SOURCE.read_text(), cc), folder, seed)
    print(f"seed {seed}", flush=True)
    if options.case is None:
        fuzzing.run(options.seconds)
    else:
        print(fuzzing.one(options.case, folder / "case"))
    print(f"{sum(fuzzing.seen.values())} cases: {dict(sorted(fuzzing.seen.items()))}")
    if fuzzing.failure is not None:
        print(fuzzing.failure, file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
