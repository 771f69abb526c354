"""Runs as a process of the tests of sharing: publishes `cuda_model`'s model, which others read.

Memory of a GPU cannot be opened by the process that made it, so the owner is another one.  Does
what it is told on stdin, a line at a time, and answers a line.  Its argument says which memory the
model lies in: ``torch`` (its allocator, as the environment sets it), ``pages`` (mapped by hand and
exportable by nobody, as the memory saver does it) or ``saver`` (torch_memory_saver itself).
"""

from __future__ import annotations

import hashlib
import sys
from contextlib import nullcontext
from typing import Any

from tests.gpu.cuda_model import Driver, a_model, event, fixed, live_tensors, load, noise, torch
from tests.gpu.test_cuda_pages import Pages
from tests.unit.fake_sglang import update


def a_model_in(memory: str) -> Any:
    if memory == "saver":
        from torch_memory_saver import torch_memory_saver

        context: Any = torch_memory_saver.region(tag="weights")
    else:
        context = nullcontext()
    with context:
        model = a_model()
    if memory == "pages":
        pages = Pages(Driver().library, model.big.numel())
        pages.back()
        there = torch.as_tensor(pages, device="cuda")
        assert there.data_ptr() == pages.address
        there[: model.big.numel()].copy_(model.big)
        model.big = fixed(there[: model.big.numel()])
        model.keeps = pages
    return model


def digest(tensor: Any) -> str:
    values = tensor.detach().contiguous().view(-1)
    values = values.view(torch.uint8) if values.numel() else torch.empty(0, dtype=torch.uint8)
    return hashlib.sha256(bytes(values.cpu().numpy().data)).hexdigest()


runner = load(a_model_in(sys.argv[1]))
tensors = live_tensors(runner)
stream = torch.cuda.Stream()
# The driver loads a kernel when it is first asked for, and waits for a busy device to do so: it is
# not to be mistaken for us.
torch.cuda._sleep(1)
torch.empty_like(tensors["big"][:8]).fill_(77)
torch.cuda.synchronize()


def fill() -> None:
    for tensor in tensors.values():
        if tensor.numel():
            tensor.copy_(noise(tensor.dtype, *tensor.shape))


def told(what: str, argument: str) -> str:
    if what == "digest":
        return digest(tensors[argument])
    if what == "names":
        return " ".join(tensors)
    if what == "fill":
        update(runner, during=fill)
    elif what == "queue":  # an update that returns long before the device has written it

        def late() -> None:
            torch.cuda._sleep(int(float(argument) * 1.5e9))
            tensors["big"].fill_(77)

        update(runner, during=late)
    elif what == "busy":  # SGLang's stream is, for so many seconds; no weight is written
        with torch.cuda.stream(stream):
            torch.cuda._sleep(int(float(argument) * 1.5e9))
    elif what == "capture":  # a CUDA graph, until it is told to go on
        graph, numbers = torch.cuda.CUDAGraph(), torch.zeros(1024, device="cuda")
        with torch.cuda.graph(graph, stream=stream):
            print("capturing", flush=True)
            sys.stdin.readline()
            numbers += 1
        graph.replay()
        torch.cuda.synchronize()
        return str(int(numbers.sum()))
    elif what == "idle?":
        return str(stream.query())
    elif what == "release":
        event("release_memory_occupation", "release", tags=["weights"], physical=True)
    elif what == "free":
        return str(torch.cuda.mem_get_info()[0])
    return "done"


print("ready", flush=True)
for line in sys.stdin:
    word, _, rest = line.strip().partition(" ")
    with torch.no_grad():
        print(told(word, rest), flush=True)
