"""Which SGLang releases run on a CPU here, and what each of them needs.

This table is the only place that knows about the differences; everything else
reads it.  The packages themselves are in ``locks/`` and ``overlays/``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).resolve().parent

BASE_RELEASE = "0.5.23"

# Folders below shims/.  COMMON and TRITON serve every release: no triton kernel can
# run without a GPU, so the 200 MB of triton would only ever be imported.
COMMON = "common"
TRITON = "triton_absent"
# Up to 0.5.6, SGLang takes a few plain layers from vllm on machines without CUDA.
VLLM = "vllm_absent"
# Calls of 0.4.x that assume CUDA.
SGLANG_0_4 = "sglang_0_4"

_TODAY = (COMMON, TRITON)
_WITH_VLLM = (COMMON, TRITON, VLLM)
_OLDEST = (COMMON, TRITON, SGLANG_0_4, VLLM)

# The grammar library of that time is not installed; structured output is of no
# interest to weights.
_NO_GRAMMAR = ("--grammar-backend", "none")


@dataclass(frozen=True)
class Release:
    """One SGLang release and its needs beyond the shared venv."""

    name: str
    shims: tuple[str, ...]
    server_flags: tuple[str, ...] = ()
    # 0.4.6 and 0.4.7: /update_weights_from_distributed takes one parameter per request.
    one_weight_per_request: bool = False

    @property
    def is_base(self) -> bool:
        return self.name == BASE_RELEASE

    @property
    def pins(self) -> Path:
        """The requirements file that makes this release."""
        return _HERE / ("locks" if self.is_base else "overlays") / f"{self.name}.txt"

    @property
    def shim_paths(self) -> list[Path]:
        return [_HERE / "shims" / folder for folder in self.shims]


# fmt: off
RELEASES: dict[str, Release] = {
    release.name: release
    for release in (
        Release("0.5.23",       _TODAY),
        Release("0.5.22",       _TODAY),
        Release("0.5.21",       _TODAY),
        Release("0.5.20",       _TODAY),
        Release("0.5.18",       _TODAY),
        Release("0.5.15.post1", _TODAY),
        Release("0.5.12.post1", _TODAY),
        Release("0.5.10.post1", _TODAY),
        Release("0.5.9",        _TODAY),
        Release("0.5.8.post1",  _TODAY),
        Release("0.5.6.post2",  _WITH_VLLM, _NO_GRAMMAR),
        Release("0.5.5.post3",  _WITH_VLLM, _NO_GRAMMAR),
        Release("0.5.3.post3",  _WITH_VLLM, _NO_GRAMMAR),
        Release("0.5.1.post3",  _WITH_VLLM, _NO_GRAMMAR),
        Release("0.4.10.post2", _OLDEST,    _NO_GRAMMAR),
        Release("0.4.9.post6",  _OLDEST,    _NO_GRAMMAR),
        Release("0.4.7",        _OLDEST,    _NO_GRAMMAR, one_weight_per_request=True),
        Release("0.4.6.post5",  _OLDEST,    _NO_GRAMMAR, one_weight_per_request=True),
    )
}
# fmt: on

# The base release with further packages beside it: a name in place of a release's number.
DIFFUSION = "diffusion"  # what SGLang's extra of this name installs, less what needs a GPU
RAY = "ray"
ADDITIONS: dict[str, Release] = {name: Release(name, _TODAY) for name in (DIFFUSION, RAY)}


def find_release(name: str) -> Release:
    try:
        return (RELEASES | ADDITIONS)[name]
    except KeyError:
        known = ", ".join(RELEASES)
        raise KeyError(f"no CPU recipe for SGLang {name}; there is one for {known}") from None
