"""Checksums of weights, when asked for (``SGLANG_WEIGHT_HOOK_CHECKSUM=1``).

Computed where the weights lie, in pieces of `PIECE` bytes, so with a few times that much
scratch memory whatever the model's size.  The results are read at the end in one go, which is
the one place where this hook waits for the device; hence off by default.

``wsum64``: the tensor's bytes in logical (row-major) order, padded with zeros to 32-bit
little-endian words ``w[0..n)``; ``A`` is the sum of ``w[i]`` and ``B`` the sum of
``w[i] * (i + 1)``, both modulo 2**64; the checksum is ``A`` and ``B`` in 16 hexadecimal digits
each.  Any one flipped bit changes both, exchanged words change ``B``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ALGORITHM = "wsum64"
PIECE = 4 << 20  # bytes

_MASK = (1 << 64) - 1


def checksums(named: list[tuple[str, Any]]) -> dict[str, str]:
    """Checksum of each tensor by name.  Allocates on the device and synchronises once."""
    import torch

    sums = []
    with torch.no_grad():
        for _, tensor in named:
            sums.append(_sums(torch, tensor.detach()))
        # One transfer a device, not one a tensor.
        read = [(a.tolist(), b.tolist()) for a, b in _gather(torch, sums)]
    return {name: _text(*pair) for (name, _), pair in zip(named, read)}


def _gather(torch: Any, sums: list[Any]) -> list[Any]:
    by_device: dict[Any, list[int]] = {}
    for index, pair in enumerate(sums):
        by_device.setdefault(pair.device, []).append(index)
    gathered: list[Any] = [None] * len(sums)
    for indices in by_device.values():
        table = torch.stack([sums[index] for index in indices]).cpu()
        for row, index in zip(table, indices):
            gathered[index] = (row[0], row[1])
    return gathered


def _sums(torch: Any, tensor: Any) -> Any:
    """``[A, B]`` as an int64 tensor on the tensor's device."""
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    position = 0
    rest = None  # bytes that did not fill a word yet
    for piece in _pieces(tensor):
        flat = piece.reshape(-1)
        if flat.stride(0) != 1:  # one element counts as contiguous whatever its stride
            flat = flat.clone(memory_format=torch.contiguous_format)
        data = flat.view(torch.uint8)
        if rest is not None and rest.numel():
            data = torch.cat([rest, data])
        whole = data.numel() // 4 * 4
        rest = data[whole:]
        if whole:
            position = _add(torch, total, data[:whole], position)
    if rest is not None and rest.numel():
        padding = torch.zeros(4 - rest.numel(), dtype=torch.uint8, device=tensor.device)
        _add(torch, total, torch.cat([rest, padding]), position)
    return total


def _add(torch: Any, total: Any, data: Any, position: int) -> int:
    """Add the words in ``data`` (uint8, a multiple of 4 long); the next word's position."""
    # Words from bytes, since view(int32) wants an alignment that a piece need not have.
    octets = data.view(-1, 4).to(torch.int64)
    words = octets[:, 0] | octets[:, 1] << 8 | octets[:, 2] << 16 | octets[:, 3] << 24
    count = int(words.numel())
    index = torch.arange(position + 1, position + count + 1, device=data.device)
    total[0] += words.sum()
    total[1] += (words * index).sum()
    return position + count


def _pieces(tensor: Any) -> Iterator[Any]:
    """Contiguous pieces of at most `PIECE` bytes, in logical order."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return
    if tensor.dim() == 0:
        yield tensor.reshape(1)
        return
    if size <= PIECE:
        yield tensor.contiguous()
        return
    rows = tensor.shape[0]
    row_size = size // rows
    if row_size > PIECE:
        for row in range(rows):
            yield from _pieces(tensor[row])
        return
    step = max(1, PIECE // row_size)
    for start in range(0, rows, step):
        yield tensor[start : start + step].contiguous()


def _text(a: int, b: int) -> str:
    return f"{a & _MASK:016x}{b & _MASK:016x}"
