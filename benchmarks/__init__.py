"""What the hook costs, each figure measured side by side with a named baseline.

    python -m benchmarks            # everything; writes docs/benchmarks.md
    python -m benchmarks --quick    # fewer rounds, nothing written
    python -m benchmarks --only streaming reading

================= =====================================================================
``measure.py``    interleaved rounds on the CPU clock; medians, spread, ratios
``table.py``      lines of the table, on the terminal and in ``docs/benchmarks.md``
``models.py``     module trees of the shape of Llama and DeepSeek, and their runner
``baselines.py``  the floor, the prototype
``startup.py``    an interpreter's start, in instructions (also a command of its own)
``imports.py``    the import of SGLang's own modules; the prototype's start-up
``capturing.py``  capture and publication after a load
``streaming.py``  buckets of an update, a whole sync, how soon a reader knows
``reading.py``    the reader: open, parse, look up
``residence.py``  memory: what the process grows by, what is kept alive
``fleet.py``      a directory with 64 slots
================= =====================================================================
"""
