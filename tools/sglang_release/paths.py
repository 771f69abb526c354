"""Which functions that write weights run outside every wrapped method.

Calls are resolved by name, as far as a syntax tree tells: through imports, through a class's bases
and subclasses, and else by what the receiver is called (``self.weight_updater.begin()`` is a
method of a class named ``…WeightUpdater``).  A function that nobody is seen to call, and one that
is handed on to be called by somebody else, can run at any time: those are where paths begin.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple, Optional

from .summaries import LIBRARY, NAMED, Class, Evidence, Function, Handler, Summary, Use

Place = tuple[str, str, str]  # module, class or "", function

# Methods of one name in more classes than this say nothing about which is meant.
_TOO_COMMON = 6


class Resolved(NamedTuple):
    places: list[Place]
    is_sure: bool  # by an import, a class or the receiver's name, and not by the method's alone


class Paths:
    """The functions of a release and who calls whom."""

    def __init__(self, summary: Summary) -> None:
        self._modules = summary.modules
        self.functions: dict[Place, Function] = {}
        self._classes: dict[str, list[Class]] = defaultdict(list)
        self._subclasses: dict[str, list[Class]] = defaultdict(list)
        self._methods: defaultdict[str, list[Place]] = defaultdict(list)
        self._bare: defaultdict[str, list[Place]] = defaultdict(list)
        for module in summary.modules.values():
            for each in module.classes:
                self._classes[each.name].append(each)
                for base in each.bases:
                    self._subclasses[base].append(each)
            for function in module.functions:
                self.functions[function.place] = function
                by_name = self._methods if function.owner else self._bare
                by_name[function.name].append(function.place)
        self.callees: dict[Place, set[Place]] = defaultdict(set)
        self._callers: dict[Place, set[Place]] = defaultdict(set)
        self._handed_on: set[Place] = set()
        for function in self.functions.values():
            self._connect(function)
        self.handlers: dict[Place, Handler] = {
            place: handler
            for function in self.functions.values()
            for handler in function.handlers
            for place in self._resolve(function, handler.method).places
        }
        self.writers = self._writers()

    # --- who calls whom ---------------------------------------------------------------------

    def _connect(self, function: Function) -> None:
        for use in function.uses:
            for place in self._resolve(function, use).places:
                if place == function.place:
                    continue
                # Who names a class makes one of it, or hands it to whom does.
                made = place[2] == "__init__" and use.name != "__init__"
                if use.called or made or self.functions[place].is_property:
                    self.callees[function.place].add(place)
                    self._callers[place].add(function.place)
                else:
                    self._handed_on.add(place)

    def _resolve(self, function: Function, use: Use) -> Resolved:
        if use.receiver == "":
            return Resolved(self._bare_name(function.module, use.name), True)
        if use.receiver in ("self", "cls"):
            return self._own(function, use)
        if use.receiver == "super":
            bases = self.ancestors(function.module, function.owner)[1:]
            return Resolved(self._first(bases, use.name), True)
        return self._of_receiver(function, use)

    def _bare_name(self, module: str, name: str, depth: int = 4) -> list[Place]:
        if (module, "", name) in self.functions:
            return [(module, "", name)]
        for each in self._classes.get(name, ()):
            if each.module == module:
                return self._first(self.ancestors(module, name), "__init__")
        origin = self._modules[module].imports.get(name) if module in self._modules else None
        if origin is None or depth == 0:
            return []
        if origin[0] in self._modules:
            return self._bare_name(*origin, depth - 1)
        # From a package whose own file was not worth reading.
        alone = self._bare.get(origin[1], [])
        return alone if len(alone) == 1 and origin[0].startswith("sglang") else []

    def _own(self, function: Function, use: Use) -> Resolved:
        found = self._first(self.ancestors(function.module, function.owner), use.name)
        below = self._subclasses.get(function.owner, [])
        found += [
            (each.module, each.name, use.name)
            for each in below
            if (each.module, each.name, use.name) in self.functions
        ]
        # A mixin calls what its siblings define; a field that can be called goes by its name.
        return Resolved(found, True) if found else self._by_method_name(function, use.name)

    def _of_receiver(self, function: Function, use: Use) -> Resolved:
        for kind in self._kinds(function, use):
            found = self._first(self.ancestors(function.module, kind), use.name)
            if found:
                return Resolved(found, True)
        origin = self._modules[function.module].imports.get(use.receiver)
        if use.receiver in self._classes:
            found = self._first(self.ancestors(function.module, use.receiver), use.name)
            return Resolved(found, True)
        if origin is not None:
            module = ".".join(part for part in origin if part)
            if module in self._modules:
                return Resolved(self._bare_name(module, use.name), True)
            if not module.startswith("sglang"):
                return Resolved([], True)  # json.load, torch.load
        return self._by_method_name(function, use.name, use.receiver)

    def _can_be(self, place: Place, hint: str) -> bool:
        """Whether the class of a method, or one that inherits it, is called like the receiver."""
        names, pending = {place[1]}, [place[1]]
        while pending:
            below = {each.name for each in self._subclasses.get(pending.pop(), ())} - names
            names |= below
            pending += below
        return any(_is_alike(name, hint) for name in names)

    def _kinds(self, function: Function, use: Use) -> list[str]:
        """The class of the receiver, where it is made in sight."""
        if use.typed_by != "self":
            return [use.typed_by] if use.typed_by else []
        owners = self.ancestors(function.module, function.owner)
        return [each.made[use.receiver] for each in owners if use.receiver in each.made]

    def _by_method_name(self, function: Function, name: str, receiver: str = "") -> Resolved:
        # Language and diffusion models are two programs that share a package.
        part = function.module.split(".")[1]
        candidates = [each for each in self._methods[name] if each[0].split(".")[1] == part]
        if name.startswith("__"):
            return Resolved([], False)
        held = re.sub(r"^_*(get_|current_)?", "", receiver)
        for hint in (held, re.sub(r"^(draft|target|main|tp)_", "", held)):
            alike = [each for each in candidates if len(hint) > 4 and self._can_be(each, hint)]
            if alike:
                return Resolved(alike, True)
        # A single word says nothing (load, update), nor does what many classes have.
        if "_" not in name.strip("_") or len(candidates) > _TOO_COMMON:
            return Resolved([], False)
        return Resolved(candidates, False)

    def _first(self, classes: Iterable[Class], name: str) -> list[Place]:
        for each in classes:
            if (each.module, each.name, name) in self.functions:
                return [(each.module, each.name, name)]
        return []

    def ancestors(self, module: str, name: str) -> list[Class]:
        """A class and its bases, nearest first; bases are found by name."""
        found: list[Class] = []
        pending = deque([(module, name)])
        while pending:
            where, name = pending.popleft()
            candidates = self._classes.get(name, [])
            imported = self._modules[where].imports.get(name) if where in self._modules else None
            home = [c for c in candidates if c.module == where]
            home = home or [c for c in candidates if imported and c.module == imported[0]]
            for each in home or candidates[:1]:
                if each not in found:
                    found.append(each)
                    pending += [(each.module, base) for base in each.bases]
        return found

    def attributes_of(self, name: str) -> set[str]:
        """What the classes of that name, and their bases, are seen to have."""
        lines = [self.ancestors(each.module, each.name) for each in self._classes.get(name, ())]
        return {attribute for line in lines for each in line for attribute in each.attributes}

    def subclasses_of(self, module: str, name: str) -> Iterator[Class]:
        for classes in self._classes.values():
            for each in classes:
                above = self.ancestors(each.module, each.name)[1:]
                if any((base.module, base.name) == (module, name) for base in above):
                    yield each

    # --- what writes ------------------------------------------------------------------------

    def _writers(self) -> dict[Place, Evidence]:
        """Functions that write themselves, or by a call of the library of loaders."""
        library = {
            place
            for place, function in self.functions.items()
            if is_library(function.module) and self._evidence(function)
        }
        pending = list(library)
        while pending:
            for caller in self._callers[pending.pop()]:
                if is_library(caller[0]) and caller not in library:
                    library.add(caller)
                    pending.append(caller)
        found: dict[Place, Evidence] = {}
        for place, function in self.functions.items():
            if is_library(function.module):
                continue
            own = self._evidence(function)
            called = sorted(self.callees[place] & library)
            if own is not None:
                found[place] = own
            elif called:
                last = self.functions[called[0]]
                text = f"{last.module.rpartition('.')[2]}.{last.title}"
                found[place] = Evidence("calls a loader that writes weights", function.line, text)
        return found

    def _evidence(self, function: Function) -> Optional[Evidence]:
        for each in function.evidence:
            if each.kind == NAMED:
                continue
            if each.call is not None:
                resolved = self._resolve(function, each.call)
                seen = [place for place in resolved.places if not is_library(place[0])]
                if resolved.is_sure and seen:
                    continue
            return each
        return None

    def reaching(self, targets: Iterable[Place]) -> set[Place]:
        """The functions from which one of ``targets`` is called, directly or not."""
        found: set[Place] = set()
        pending = list(targets)
        while pending:
            for caller in self._callers[pending.pop()]:
                if caller not in found:
                    found.add(caller)
                    pending.append(caller)
        return found

    def outside(self, wrapped: Collection[Place]) -> dict[Place, Optional[Place]]:
        """The functions that can run outside of ``wrapped``, each with its caller on the way."""
        reached: dict[Place, Optional[Place]] = {}
        pending: deque[Place] = deque()
        for place in self.functions:
            if place not in wrapped and (not self._callers[place] or place in self._handed_on):
                reached[place] = None
                pending.append(place)
        while pending:
            place = pending.popleft()
            for callee in sorted(self.callees[place]):
                if callee not in wrapped and callee not in reached:
                    reached[callee] = place
                    pending.append(callee)
        # What is left calls only each other, in circles.
        return reached

    def callers(self, place: Place) -> set[Place]:
        return self._callers[place]


def way_to(place: Place, reached: dict[Place, Optional[Place]]) -> list[Place]:
    """The functions from where the path begins down to ``place``."""
    way: list[Place] = []
    step: Optional[Place] = place
    while step is not None:
        way.insert(0, step)
        step = reached[step]
    return way


def is_library(module: str) -> bool:
    return f"{module}.".startswith(LIBRARY)


def _is_alike(owner: str, hint: str) -> bool:
    """Whether an attribute of this name can hold one of that class."""
    name = re.sub(r"_v\d+$|_impl$", "", _snake_case(owner).strip("_"))
    return name.endswith(hint) or name.startswith(hint) or (len(name) > 8 and hint.endswith(name))


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
