"""docs/truth-matrix.md: what was compared with what, row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tests.real_sglang.truth.comparison import BY_NAME, CHECKER, PROBE, Moment
from tests.real_sglang.truth.outside_bytes import PublishedMap
from tests.real_sglang.truth.rows import Row

HEAD = (
    "model",
    "SGLang's class",
    "laid out",
    "tensors",
    "bytes a look",
    "confirmed by `/weights_checker`",
    "by `/get_weights_by_name`",
    "by the probe",
    "by the probe alone",
    "looks",
    "result",
)

PAGE = """\
# Truth matrix

Does a published address hold the tensor that the map says it does?  `make test-truth` asks that
of real SGLang {release} servers on the CPU, of which nobody has to take the hook's word:
another process reads the memory with `process_vm_readv(2)`, using nothing but a tensor's `ptr`,
`dtype`, `shape` and `stride`, and compares the values with SGLang's own answers.

{table}

**Sources.** *`/weights_checker`*: SGLang's SHA-256 of each parameter and of the buffers that it
counts, computed again from the bytes read outside. *`/get_weights_by_name`*: SGLang's values of
a parameter, all of them, under its own name and part by part under the checkpoint's names; few
model classes have the method. *The probe*: test equipment inside the server that knows nothing
of the hook, and hashes what torch has there; every tensor is also held against it by place, and
for some (rotary caches, tensors that modules hold as plain attributes, the LoRA pool, stages of
a pipeline that SGLang's routes do not reach) it is the only source. *The mark*: at each look the
server flips one bit in every live tensor, the reader must see all of them flipped, and back:
equal bytes alone could be a copy left behind.

**Looks**, in this order: {moments}.
A second and a third checkpoint are loaded and the first one again; after each, every parameter
must have other values than before, and at the end every tensor the first ones.  Last of all each
row is shown untrue maps (two tensors of one shape swapped, one left out, one an element further)
and has to find fault with each.  Rows of quantised checkpoints take no buckets, and where a forward
needs a kernel that a CPU has not, no requests (the notes say what SGLang says to one).

**Notes**

{notes}

{alone}
"""


class Report:
    def __init__(self) -> None:
        self._rows: list[tuple[Row, dict[str, Moment], list[PublishedMap], str]] = []

    def add(
        self,
        row: Row,
        moments: dict[str, Moment],
        maps: Sequence[PublishedMap],
        problem: str = "",
    ) -> None:
        self._rows.append((row, moments, list(maps), problem))

    def moments(self) -> Iterator[tuple[Row, Mapping[str, Moment]]]:
        return ((row, moments) for row, moments, _, _ in self._rows)

    def table(self) -> str:
        lines = [HEAD, ["---"] * len(HEAD), *(self._line(*entry) for entry in self._rows)]
        return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)

    def page(self) -> str:
        complete = max((moments for _, moments, _, _ in self._rows), key=len, default={})
        release = next(
            (maps[0].identity["sglang_version"] for _, _, maps, _ in self._rows if maps), "?"
        )
        return PAGE.format(
            release=release,
            table=self.table(),
            moments=", ".join(complete),
            notes=self._notes(),
            alone=self._confirmed_by_the_probe_alone(),
        )

    @staticmethod
    def _line(
        row: Row, moments: dict[str, Moment], maps: list[PublishedMap], problem: str
    ) -> list[object]:
        result = f"**not**: {problem.splitlines()[0][:200]}" if problem else "true at every look"
        model_class = maps[0].identity["model_class"] if maps else ""
        if not moments:
            return [row.architecture, model_class, row.layout, *[""] * 7, result]
        last = list(moments.values())[-1]
        return [
            row.architecture,
            model_class,
            row.layout,
            last.tensors,
            f"{last.compared_bytes:,}",
            last.confirmed[CHECKER],
            last.confirmed[BY_NAME],
            last.confirmed[PROBE],
            last.tensors - last.by_sglang,
            len(moments),
            result,
        ]

    def _notes(self) -> str:
        lines = []
        for row, _, _, _ in self._rows:
            if row.note:
                lines.append(f"* {row.name}: {row.note}.")
            if row.refuses_buckets:
                what = f"update from tensors is impossible; SGLang says: `{row.refuses_buckets}`"
                lines.append(f"* {row.name}: {what}. The row fails once SGLang takes them.")
            if row.refuses_disk:
                what = f"another checkpoint is refused; SGLang says: `{row.refuses_disk}`"
                lines.append(f"* {row.name}: {what}. The row fails once SGLang takes one.")
            if row.ends_of_disk:
                what = f"another checkpoint ends SGLang's scheduler: `{row.ends_of_disk}`"
                lines.append(f"* {row.name}: {what}. The map then says `failed`.")
            if row.silent:
                what = f"no request is made, for SGLang then ends with: `{row.silent}`"
                lines.append(f"* {row.name}: {what}.")
        return "\n".join(lines)

    def _confirmed_by_the_probe_alone(self) -> str:
        lines = ["**Confirmed by the probe alone**, at the last look of each row:", ""]
        for row, moments, _, _ in self._rows:
            if not moments:
                continue
            last = list(moments.values())[-1]
            lines.append(f"* {row.name}: {', '.join(last.by_probe_alone()) or 'none'}.")
        return "\n".join(lines)
