"""The memory of a GPU server on this machine, opened by this process through the CUDA driver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from ..reader import Document, Tensor
from .backend import Run
from .errors import NotReadable

NAME = "cuda"


class CudaMemory:
    """Opens what the owner of ``document`` shares."""

    name = NAME

    def __init__(self, document: Document) -> None:
        raise NotReadable("memory of GPUs cannot be opened by this release")

    def reaches(self, tensor: Tensor) -> bool:
        return False

    def view(self, tensor: Tensor) -> Optional[Any]:
        return None

    def fetch(self, runs: Sequence[Run], target: memoryview) -> None:
        raise NotReadable("memory of GPUs cannot be opened by this release")

    def close(self) -> None:
        pass
