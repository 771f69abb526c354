"""A real, unmodified SGLang server on a machine without a GPU.

The demo, the real-server tests and the benchmarks all need SGLang itself, not a
fake of it, and they need it where there is no GPU: on a laptop, in CI.  SGLang's
CPU path is enough for that, once the packages it imports and never uses there are
accounted for.  Nothing of SGLang is edited or replaced; what is missing *around*
it (compiled GPU kernels, triton, vllm) is stood in for on ``PYTHONPATH``.

====================== ==================================================================
``releases.py``        the table: which releases, and what each of them needs
``environment.py``     installs a release: one shared venv, one overlay per other release
``tiny_model.py``      writes a random checkpoint of a few hundred kilobytes (runs in the venv)
``architectures.py``   what a checkpoint of each architecture holds
``tiny_adapter.py``    writes a random LoRA adapter for such a checkpoint (runs in the venv)
``server.py``          starts the server, talks to it, and leaves no process behind
``orphan_guard.py``    ends the server of a killed caller
``online_updates.py``  sends weights as a trainer does: tensors, gloo (runs in the venv)
``locks/``             the complete set of packages of the shared venv
``overlays/``          what each other release needs instead
``shims/``             the stand-ins, one folder per reason
====================== ==================================================================

What runs under the machine's own Python (everything but ``tiny_model``,
``tiny_adapter`` and ``online_updates``) uses the standard library alone: it is what does
the installing.

    python -m cpu_sglang setup
    python -m cpu_sglang serve
"""
