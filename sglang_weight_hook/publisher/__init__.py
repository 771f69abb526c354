"""Everything that runs inside SGLang's process: events in, published documents out.

`recorder` is told by the patch core that a call begins and ends; `tracked` is one model runner's
slot and state; `capture` (over `walk` and `rows`) notes where each tensor lies; `document` and
`legacy` make the JSON; `publish` owns the slot's files and locks.  Standard library, and what
SGLang's environment has; nothing of the reading half.
"""
