"""Checks of bytes read by another process from a real server's GPU, through the hook's own reader.

They are held against the checkpoint, and against what the driver reads inside the server.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import sglang_weight_hook as hook
from tests.gpu import checkpoint_bytes
from tests.gpu.gpu_server import GpuServer
from tests.gpu.map_checks import Report

SHARES = {"SGLANG_WEIGHT_HOOK_SHARE": "1"}
STANDALONE = (
    "--speculative-algorithm", "STANDALONE",
    "--speculative-num-steps", "2",
    "--speculative-eagle-topk", "1",
    "--speculative-num-draft-tokens", "3",
)  # fmt: skip


def shared(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """A target and a draft, read from outside: before and after an update from disk."""
    arguments = [*STANDALONE, "--speculative-draft-model-path", str(b)]
    with GpuServer(python, a, folder, arguments, SHARES) as server:
        for way in ("cuda", "owner"):
            with report.check(f"the target's bytes by {way} are the checkpoint's") as seen:
                seen.update(compare(server.maps.slot("0"), a, way))
        with report.check("the draft's bytes are what the driver reads in the server") as seen:
            slot = server.maps.slot("0_draft")
            seen.update(compare_raw(slot, server.bytes_by_slot()["0_draft"]))
        with report.check("bytes after an update from disk") as seen:
            status, answer = server.update_weights_from_disk(b)
            assert status == 200, answer
            seen.update(compare(server.maps.slot("0"), b, None))
        stands(report, server)


def shared_saver(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """Memory of the memory saver: copied by the owner; released, resumed and written again."""
    with GpuServer(python, a, folder, ["--enable-memory-saver"], SHARES) as server:
        slot = server.maps.slot("0")
        with report.check("memory saver: the owner copies what cannot be opened") as seen:
            exports = {region.export for region in slot.read().iter_regions()}
            assert "none" in exports, exports
            seen.update(compare(slot, a, None), exports=sorted(map(str, exports)))
        with report.check("memory saver: released memory is not read") as seen:
            document = slot.read()
            server.wait_idle()
            status, answer = server.post("/release_memory_occupation", {"tags": ["weights"]})
            assert status == 200, answer
            try:
                document.open_memory()
            except hook.Changed as error:
                seen["said"] = str(error)
            else:
                raise AssertionError("released memory was opened")
        with report.check("memory saver: bytes after resume and an update") as seen:
            status, answer = server.post("/resume_memory_occupation", {"tags": ["weights"]})
            assert status == 200, answer
            status, answer = server.update_weights_from_disk(b)
            assert status == 200, answer
            seen.update(compare(slot, b, None))
        stands(report, server)


def shared_fp8(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """Weights quantised while they load: transposed FP8 and scales."""
    with GpuServer(python, a, folder, ["--quantization", "fp8"], SHARES) as server:
        with report.check("FP8: every tensor is what the driver reads in the server") as seen:
            slot = server.maps.slot("0")
            seen.update(compare_raw(slot, server.bytes_by_slot()["0"]))
            types = Counter(tensor.dtype for tensor in slot.read().iter_tensors())
            assert any("float8" in dtype for dtype in types), types
            seen["dtypes"] = dict(types)
        stands(report, server)


def compare(slot: hook.Slot, model: Path, way: str | None) -> dict[str, object]:
    """Every tensor of the checkpoint, as the server has it, read from outside."""
    wanted = checkpoint_bytes.expected(model)
    ways: Counter[str] = Counter()
    with slot.weights_held():
        document = slot.read()
        with document.open_memory(via=way) as memory:
            wrong = []
            for name, digest in wanted.items():
                found = hashlib.sha256()
                for piece in memory.pieces(name):
                    found.update(piece)
                if found.hexdigest() != digest:
                    wrong.append(name)
                ways[memory.via(name)] += 1
    assert not wrong, wrong
    assert sum(ways.values()) == len(wanted) > 10
    return {"equal": len(wanted), "ways": dict(ways)}


def compare_raw(slot: hook.Slot, held: dict[str, str]) -> dict[str, object]:
    """Every tensor, against the SHA-256 of the bytes that it spans in the server."""
    compared, padded = 0, 0
    with slot.weights_held():
        document = slot.read()
        with document.open_memory() as memory:
            for tensor in document.iter_tensors():
                if tensor.name not in held:
                    continue
                if tensor.span != tensor.size:
                    padded += 1  # what lies between its elements is not read
                    continue
                data = _in_memory_order(memory.read(tensor.name), tensor)
                assert hashlib.sha256(data).hexdigest() == held[tensor.name], tensor.name
                compared += 1
    assert compared > 10
    return {"equal": compared, "padded": padded}


def _in_memory_order(values: bytes, tensor: hook.Tensor) -> bytes:
    """Row-major values, put back as they lie in memory, for a tensor without gaps.

    >>> raw = {"ptr": 64, "size": 6, "device": "cuda:0", "dtype": "torch.uint8", "shape": [2, 3],
    ...        "stride": [1, 2], "kind": "parameter"}
    >>> _in_memory_order(b"abcdef", hook.Tensor.from_raw("columns", raw))
    b'adbecf'
    """
    result = bytearray(len(values))
    itemsize = tensor.itemsize
    if not itemsize or tensor.shape == () or len(tensor.shape) > 2:
        return values  # as torch makes them, more dimensions are row-major
    rows, columns = (1, *tensor.shape)[-2:]
    row_step, step = (0, *tensor.stride)[-2:]
    if step == 1:
        return values
    assert row_step == 1, tensor
    for column in range(columns):
        for byte in range(itemsize):  # each column in one slice
            start = column * step * itemsize + byte
            result[start : start + rows * itemsize : itemsize] = values[
                column * itemsize + byte :: columns * itemsize
            ]
    return bytes(result)


def stands(report: Report, server: GpuServer) -> None:
    with report.check("the server answers, and has said nothing of the device") as seen:
        assert server.generate()
        said = [line for line in server.said() if "CUDA error" in line or "Exception" in line]
        assert not said, said
        seen["log"] = len(server.said())
