"""Stands in for vllm, from which older SGLang takes two activations and two norms.

They are plain layers and are written here in plain torch, so the model computes what
it should; vllm's quantised operators are absent and say so when called.
"""

__version__ = "0.0.0+absent"
