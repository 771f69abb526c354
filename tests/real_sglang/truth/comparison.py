"""One moment of a server's life: the bytes read from outside against every answer there is."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.real_sglang.truth import sglang_answers
from tests.real_sglang.truth.outside_bytes import Place, PublishedMap, as_floats

CHECKER, BY_NAME, PROBE = "weights_checker", "get_weights_by_name", "probe"


PLACE = ("ptr", "dtype", "shape", "stride")


class Probe:
    """Asks the thread inside the server (truth_probe.py)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._asked = 0

    def ask(self, what: str, processes: int) -> dict[int, Any]:
        """The answers, by pid."""
        self._asked += 1
        (self.directory / f"{what}-{self._asked}").touch()
        deadline = time.monotonic() + 60
        while True:
            answers = list(self.directory.glob(f"{what}ed-{self._asked}-*.json"))
            if len(answers) == processes:
                break
            assert time.monotonic() < deadline, f"{len(answers)} of {processes} answered"
            time.sleep(0.05)
        return {int(path.stem.rpartition("-")[2]): json.loads(path.read_text()) for path in answers}


@dataclass
class Moment:
    """What was read from outside, what confirmed it, and what did not."""

    values: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by slot and name
    kinds: dict[str, dict[str, str]] = field(default_factory=dict)
    confirmed: Counter[str] = field(default_factory=Counter)  # tensors, by source
    by_sglang: int = 0  # tensors that a source other than our own probe answered for
    probe_alone: list[str] = field(default_factory=list)  # names
    compared_bytes: int = 0
    unconfirmed: list[str] = field(default_factory=list)
    # Names that the model has for a published tensor beside those that the map lists.
    unlisted: set[str] = field(default_factory=set)
    untrue: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> int:
        return sum(map(len, self.values.values()))

    def by_probe_alone(self) -> list[str]:
        """What SGLang did not answer for, with numbers of layers and experts left out."""
        counted = Counter(map(without_numbers, self.probe_alone))
        return [f"`{name}` ({number})" for name, number in counted.items()]

    def parameters(self) -> dict[tuple[str, str], bytes]:
        return {
            (slot, name): values
            for slot, named in self.values.items()
            for name, values in named.items()
            if self.kinds[slot][name] == "parameter"
        }


def compare(maps: list[PublishedMap], routes: sglang_answers.Routes | None, probe: Probe) -> Moment:
    """Read all that the maps publish, ask all sources, and hold one against the other.

    Without ``routes``, in a program that has none, the probe and the mark are the sources.
    """
    moment = Moment()
    for one in maps:
        with one.held():
            moment.values[one.slot] = {
                name: Place.of(found).read(one.pid) for name, found in one.tensors.items()
            }
        moment.kinds[one.slot] = {name: found["kind"] for name, found in one.tensors.items()}
        moment.compared_bytes += sum(map(len, moment.values[one.slot].values()))
    confirmed: dict[tuple[str, str], set[str]] = {
        (one.slot, name): set() for one in maps for name in one.tensors
    }

    def hold(one: PublishedMap, name: str, source: str, agrees: bool, what: str) -> None:
        canonical = one.names()[name]
        if agrees:
            confirmed[one.slot, canonical].add(source)
        else:
            moment.untrue.append(f"slot {one.slot}: {name}: {source} says otherwise ({what})")

    if routes is not None:
        _hold_against_checksums(maps, moment, routes, hold)
        _hold_against_values(maps, moment, routes, hold)
    _hold_against_probe(maps, moment, probe, hold)
    _hold_against_marks(maps, moment, probe)

    for (slot, name), sources in confirmed.items():
        moment.confirmed.update(sources)
        moment.by_sglang += bool(sources - {PROBE})
        if sources == {PROBE}:
            moment.probe_alone.append(name)
        if not sources:
            moment.unconfirmed.append(f"slot {slot}: {name} ({moment.kinds[slot][name]})")
    return moment


def _hold_against_checksums(
    maps: list[PublishedMap], moment: Moment, routes: sglang_answers.Routes, hold: Any
) -> None:
    by_rank = {rank_of(one): one for one in maps}
    assert len(by_rank) == len(maps), "two slots say that they are the same rank"
    for rank, sums in sglang_answers.checksums(routes).items():
        one = by_rank[rank]
        names = one.names()
        for name, expected in sums.items():
            if name not in names:
                moment.untrue.append(f"slot {one.slot}: {name} is not in the map")
                continue
            found = sglang_answers.checksum(moment.values[one.slot][names[name]])
            hold(one, name, CHECKER, found == expected, f"{expected}, not {found}")


def _hold_against_values(
    maps: list[PublishedMap], moment: Moment, routes: sglang_answers.Routes, hold: Any
) -> None:
    dp_size = len({one.identity["dp_rank"] or 0 for one in maps})
    values = sglang_answers.NamedValues(routes, dp_size)
    # SGLang answers by the model's own method; most models have none.
    first_stage = min(maps, key=lambda one: rank_of(one)[1])
    if values.answers(next(iter(first_stage.tensors)))[0] is None:
        return
    for dp_rank in range(dp_size):
        # The routes answer for one stage of a pipeline.
        group = [
            one
            for one in maps
            if (one.identity["dp_rank"] or 0) == dp_rank
            and rank_of(one)[1] == rank_of(first_stage)[1]
        ]
        group.sort(key=rank_of)
        first = group[0]
        for name, published in first.tensors.items():
            if published["kind"] != "parameter":
                continue
            answer = values.answers(name)[dp_rank]
            if answer is None:
                continue
            sides = group if sglang_answers.gathered(name) else [first]
            expected = _side_by_side(
                [
                    as_floats(moment.values[one.slot][name], Place.of(published).dtype)
                    for one in sides
                ],
                rows=published["shape"][0],
            )
            for one in sides:
                hold(one, name, BY_NAME, expected == answer, "other values")
            # Of packed weights the parts do not lie one behind the other.
            plain = name.endswith((".weight", ".bias"))
            parts = values.parts(name, dp_rank) if plain else None
            if parts is not None:
                hold(first, name, BY_NAME, expected == parts, "other values, part by part")


def _side_by_side(blocks: list[list[float]], rows: int) -> list[float]:
    columns = len(blocks[0]) // rows
    return [
        value
        for row in range(rows)
        for block in blocks
        for value in block[row * columns : (row + 1) * columns]
    ]


def _hold_against_probe(maps: list[PublishedMap], moment: Moment, probe: Probe, hold: Any) -> None:
    digests = probe.ask("digest", len(maps))
    for one in maps:
        (runner,) = digests[one.pid]
        names = one.names()
        places = [[found[field] for field in PLACE] for found in one.tensors.values()]
        for name, truth in runner["tensors"].items():
            true = [truth[field] for field in PLACE]
            if name not in names:
                if true in places:
                    moment.unlisted.add(without_numbers(name))
                else:
                    what = f"{name} ({truth['kind']}) is not in the map"
                    moment.untrue.append(f"slot {one.slot}: {what}")
                continue
            published = one.tensors[names[name]]
            said = [published[field] for field in PLACE]
            hold(one, name, PROBE, said == true, f"at {true}, not {said}")
            digest = hashlib.sha256(moment.values[one.slot][names[name]]).hexdigest()
            hold(one, name, PROBE, digest == truth["sha256"], "other values")


def _hold_against_marks(maps: list[PublishedMap], moment: Moment, probe: Probe) -> None:
    """The memory behind each address is the live tensor's, and no copy that was left behind.

    Equal bytes would not tell the two apart; a bit flipped by the process itself does.
    """
    for expected in (1, 0):
        probe.ask("mark", len(maps))
        for one in maps:
            with one.held():
                for name, found in one.tensors.items():
                    place = Place.of(found)
                    before = moment.values[one.slot][name]
                    if before and place.read(one.pid)[0] != before[0] ^ expected:
                        what = "a bit flipped in the live tensor is not seen here"
                        moment.untrue.append(f"slot {one.slot}: {name}: {what}")


def without_numbers(name: str) -> str:
    return re.sub(r"\.\d+", ".N", name)


def rank_of(one: PublishedMap) -> sglang_answers.Rank:
    tp, pp, dp = (one.identity[f"{kind}_rank"] or 0 for kind in ("tp", "pp", "dp"))
    return tp, pp, dp
