"""Has anything moved?  The quick question after a bucket, answered without a loop over tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain, repeat
from operator import attrgetter, is_, is_not, itemgetter
from typing import Any, NamedTuple, Optional

from .reach import Path, follow
from .walk import Walk, is_wrapper, no_pause

# Of all tensors, in one order: names, addresses, shapes, strides and dtypes.
Places = tuple[list[str], list[int], list[Any], list[Any], list[Any]]


class Footprint(NamedTuple):
    """What `moved` compares: cheap to take again, because it knows where tensors are held.

    Modules are held weakly and told by their position in ``modules``: nothing of the model lives
    on because of us.
    """

    modules: list[weakref.ref[Any]]  # that hold tensors or other modules; the model is the first
    owners: list[int]  # those among them with parameters
    buffered: list[int]  # those with buffers
    # Under which name a module is found in which other: three lists of one length.
    parents: list[int]
    names: list[str]
    children: list[int]
    attributes: list[tuple[int, tuple[Path, ...]]]  # those that hold tensors otherwise
    # Positions among the tensors of those on another device: SGLang's offloaders put a copy on the
    # device in their place while a forward runs (srt/utils/offloader.py, functional_call).
    swapped: list[int]
    places: Places


_dtype_of = attrgetter("dtype")
_device_of = attrgetter("device.type")
_state_of = attrgetter("__dict__")
_parameters_of = itemgetter("_parameters")
_buffers_of = itemgetter("_buffers")
_modules_of = itemgetter("_modules")


def footprint_of(model: Any, walk: Walk, device_type: str) -> Optional[Footprint]:
    keys_of = walk.attributes
    footprint = Footprint([], [], [], [], [], [], [], [], ([], [], [], [], []))
    modules = [model]
    known = {id(model): 0}
    try:
        for position, module in enumerate(modules):  # which grows meanwhile
            state = module.__dict__
            if state["_parameters"]:
                footprint.owners.append(position)
            if state["_buffers"]:
                footprint.buffered.append(position)
            if id(state) in keys_of:
                footprint.attributes.append((position, keys_of[id(state)]))
            for name, child in state["_modules"].items():
                inner = None if child is None else child.__dict__
                if inner is None or not (
                    inner["_parameters"]
                    or inner["_modules"]
                    or inner["_buffers"]
                    or id(inner) in keys_of
                ):
                    continue
                below = known.setdefault(id(child), len(modules))
                if below == len(modules):
                    modules.append(child)
                footprint.parents.append(position)
                footprint.names.append(name)
                footprint.children.append(below)
        footprint.modules.extend(map(weakref.ref, modules))
    except Exception:  # what is no module of torch's making
        return None
    found = tensors_of(footprint, model)
    if found is None:
        return None
    devices = map(_device_of, found[1])
    footprint.swapped.extend(k for k, device in enumerate(devices) if device != device_type)
    places = places_of(footprint, model)
    return None if places is None else footprint._replace(places=places)


def tensors_of(footprint: Footprint, model: Any) -> Optional[tuple[list[str], list[Any]]]:
    """Names and tensors where the footprint says that they are held; None where it is not so."""
    # A model in place of the first: a diffusion pipeline's outermost module is made anew each time.
    modules = [model, *(reference() for reference in footprint.modules[1:])]
    if not all(map(is_not, modules, repeat(None))):
        return None
    try:
        states = list(map(_state_of, modules))
        within = list(map(_modules_of, states))
        held = map(dict.get, map(within.__getitem__, footprint.parents), footprint.names)
        if not all(map(is_, held, map(modules.__getitem__, footprint.children))):
            return None  # a module was replaced, or has another name
        parameters = list(map(_parameters_of, states))
        buffers = list(map(_buffers_of, states))
        owners, buffered = footprint.owners, footprint.buffered
        # A module that had none must have none now.
        if sum(map(bool, parameters)) != len(owners) or sum(map(bool, buffers)) != len(buffered):
            return None
        groups = [*map(parameters.__getitem__, owners), *map(buffers.__getitem__, buffered)]
        entries = list(chain.from_iterable(map(dict.values, groups)))
        tensors = [t for t in entries if t is not None]
        names = list(chain.from_iterable(groups))
        if len(tensors) != len(entries):
            names = [name for name, t in zip(names, entries) if t is not None]
        for position, paths in footprint.attributes:
            state = states[position]
            tensors.extend(follow(state, path) for path in paths)
    except Exception:  # a missing attribute
        return None
    return names, tensors


def places_of(
    footprint: Footprint, model: Any, pause: Callable[[], None] = no_pause
) -> Optional[Places]:
    """What tensors there are and where, of which shape and type; None where one can't be asked.

    This is what the end of a stream waits for: all modules and all tensors are asked for one
    thing after the other, without a loop over them in Python.  ``pause``: called in between, so
    that other threads need not wait for the interpreter.
    """
    import torch

    try:
        found = tensors_of(footprint, model)
        if found is None:
            return None
        names, tensors = found
        pause()
        shapes: list[Any] = list(map(torch.Tensor.size, tensors))
        pause()
        strides: list[Any] = list(map(torch.Tensor.stride, tensors))
        pause()
        dtypes = list(map(_dtype_of, tensors))
        pause()
        addresses = list(map(torch.Tensor.data_ptr, tensors))
    except Exception:  # an uninitialised parameter
        return None
    # A wrapper subclass answers 0 for its address whatever it wraps, so it can't be asked.
    if 0 in addresses and any(is_wrapper(t) for t, a in zip(tensors, addresses) if not a):
        return None
    for position in footprint.swapped:
        addresses[position], strides[position] = 0, None
    return names, addresses, shapes, strides, dtypes
