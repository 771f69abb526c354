"""Gated activations: the first half of the last dimension gates the second."""

from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]
from torch.nn import functional  # type: ignore[import-not-found, unused-ignore]


class SiluAndMul(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    def forward(self, x: Any) -> Any:
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up


class GeluAndMul(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, x: Any) -> Any:
        gate, up = x.chunk(2, dim=-1)
        return functional.gelu(gate, approximate=self.approximate) * up
