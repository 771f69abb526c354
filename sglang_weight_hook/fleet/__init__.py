"""Many servers, many machines: the node agent (`serve`), the registry, and reading from afar.

The agent stands beside the servers, reads their output directories as any reader does, and answers
over HTTP; nothing here runs in a server's process and nothing here writes into a directory.
Needs Python 3.10; the agent needs the `serve` extra, reading from afar the standard library alone.
"""
