"""Stands in for Intel's extension: SGLang 0.4.x reduces across CPU ranks through its
``distributed.all_reduce``, which torch has under the same name."""

from torch import distributed  # type: ignore[import-not-found, unused-ignore]

__all__ = ["distributed"]
