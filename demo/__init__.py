"""``make demo``: the hook at work on a real SGLang server, on any machine, in minutes."""
