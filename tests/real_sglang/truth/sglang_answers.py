"""What SGLang itself says of its weights, and what the bytes read from outside would answer.

``/weights_checker`` (action ``checksum``; SGLang 0.5.23, srt/utils/weight_checker.py): of every
parameter and every buffer but rotary caches, the first 8 bytes of the SHA-256 of its values,
row-major, in hexadecimal.  ``/get_weights_by_name`` (models/llama.py and few others): the values
as float32, of rank 0; parts that are packed in one tensor under the checkpoint's own names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

Rank = tuple[int, int, int]  # tensor, pipeline and data parallel
EVERYTHING = 1 << 30
# How models/llama.py packs them, in this order.
PACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


class Routes(Protocol):
    """The two routes, over HTTP or inside a process that embeds the engine."""

    def weights_checker(self) -> dict[str, Any]: ...

    def get_weights_by_name(self, name: str, truncate_size: int) -> Any: ...


def checksum(values: bytes) -> str:
    return hashlib.sha256(values).digest()[:8].hex()


def checksums(routes: Routes) -> dict[Rank, dict[str, str]]:
    """By rank, for as many ranks as SGLang answers for."""
    answer = routes.weights_checker()
    assert answer["success"], answer
    found: dict[Rank, dict[str, str]] = {}
    for info in answer["ranks"]:
        (who,) = info["parallelism_info"]  # one role: there is no draft
        assert who["role"] == "target"
        rank = (who["tp_rank"], who["pp_rank"], who["dp_rank"])
        assert rank not in found, f"two answers for {rank}"
        found[rank] = info["checksums"]
    return found


@dataclass
class NamedValues:
    """Values of parameters by name, one answer for each data-parallel rank."""

    routes: Routes
    dp_size: int = 1
    asked: dict[str, list[list[float] | None]] = field(default_factory=dict)

    def answers(self, name: str) -> list[list[float] | None]:
        """Flat and row-major; None where SGLang has no answer."""
        if name not in self.asked:
            answer = self.routes.get_weights_by_name(name, EVERYTHING)
            each = answer if self.dp_size > 1 and answer is not None else [answer] * self.dp_size
            self.asked[name] = [None if one is None else list(_flat(one)) for one in each]
        return self.asked[name]

    def parts(self, name: str, dp_rank: int) -> list[float] | None:
        """The same values asked for by the checkpoint's names, put together again."""
        for packed, parts in PACKED.items():
            if f".{packed}." in name:
                answers = [
                    self.answers(name.replace(f".{packed}.", f".{part}."))[dp_rank]
                    for part in parts
                ]
                if any(answer is None for answer in answers):
                    return None
                return [value for answer in answers if answer is not None for value in answer]
        return None


def gathered(name: str) -> bool:
    """Whether SGLang answers with the columns of all tensor-parallel ranks side by side."""
    return "o_proj" in name or "down_proj" in name


def _flat(answer: Any) -> Iterator[float]:
    if isinstance(answer, list):
        for item in answer:
            yield from _flat(item)
    else:
        yield float(answer)
