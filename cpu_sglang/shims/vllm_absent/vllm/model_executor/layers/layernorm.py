"""Root-mean-square norms with the fused residual that SGLang's models pass in."""

from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]


class RMSNorm(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.variance_epsilon = eps
        self.weight = torch.nn.Parameter(self._neutral_weight(hidden_size))

    @staticmethod
    def _neutral_weight(hidden_size: int) -> Any:
        return torch.ones(hidden_size)

    def _scale(self, normalised: Any, dtype: Any) -> Any:
        return normalised.to(dtype) * self.weight

    def forward(self, x: Any, residual: Any = None) -> Any:
        dtype = x.dtype
        wide = x.float() if residual is None else x.float() + residual.float()
        normalised = wide * torch.rsqrt(
            wide.square().mean(-1, keepdim=True) + self.variance_epsilon
        )
        scaled = self._scale(normalised, dtype)
        return scaled if residual is None else (scaled, wide.to(dtype))


class GemmaRMSNorm(RMSNorm):
    """Gemma stores the distance of the weight from one, and scales before rounding."""

    @staticmethod
    def _neutral_weight(hidden_size: int) -> Any:
        return torch.zeros(hidden_size)

    def _scale(self, normalised: Any, dtype: Any) -> Any:
        return (normalised * (1.0 + self.weight.float())).to(dtype)
