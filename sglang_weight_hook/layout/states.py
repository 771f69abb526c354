"""What a slot can be in, and the parts of memory that SGLang can release."""

from __future__ import annotations

LOADING, READY, UPDATING, FAILED, RELEASED = "loading", "ready", "updating", "failed", "released"
STATES = (LOADING, READY, UPDATING, FAILED, RELEASED)

# SGLang's tags of what release and resume can name (sglang/srt/constants.py); a request without
# tags means all that the release knows.
WEIGHTS, KV_CACHE, CUDA_GRAPH = "weights", "kv_cache", "cuda_graph"
TAGS = (WEIGHTS, KV_CACHE, CUDA_GRAPH)

RESIDENT = "resident"  # RELEASED is the other value of a tag's residency
