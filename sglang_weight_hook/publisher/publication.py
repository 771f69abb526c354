"""What a runner's slot publishes: documents, state, header, event log, metrics.

Called by the recorder under its mutex.  Raises nothing that a caller has to see: what can't be
written is taken away, for it would be out of date, and the state says why.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any, Optional

from ..layout import files
from ..layout.header import Header
from ..layout.states import RELEASED, UPDATING, WEIGHTS
from . import (
    background,
    checksum,
    document,
    event_log,
    header,
    identity,
    legacy,
    memory,
    metrics,
    once,
    settings,
    subscription,
)
from . import capture as capturing
from .capture import Capture
from .events import Event
from .header import Unproven
from .tracked import Tracked


def begin(tracked: Tracked) -> None:
    """An event has begun: only the state and the header say so."""
    if tracked.event is not None:
        waited = time.time() - tracked.event.started_at
        metrics.waited(tracked.slot.name, tracked.role, waited)
        _write_state(tracked, _describe(tracked, tracked.event, None, None))


def publish_event(tracked: Tracked) -> None:
    """Publish what `Tracked.look` found; let go of the lock; the event is over."""
    event = tracked.event
    try:
        runner = tracked.runner()
        if runner is not None and event is not None:  # else collected meanwhile, and reaped
            _publish(tracked, runner, event)
    finally:
        tracked.event = None
        tracked.stream_open = False
        tracked.version += 1
        tracked.slot.unlock()


def _publish(tracked: Tracked, runner: Any, event: Event) -> None:
    description = _describe(tracked, event, event.success, time.time())
    figures: Optional[dict[str, Any]] = None
    layout: Optional[dict[str, Any]] = None
    if tracked.invalidated is None and not tracked.state_only:
        try:
            contents = _documents(tracked, runner, event, description)
        except Exception as error:
            tracked.lose(f"no document could be made: {type(error).__name__}: {error}")
        else:
            _write_documents(tracked, contents)
            layout = contents[files.LAYOUT]
            figures = contents[files.LAYOUT]["memory"]
            tracked.told_updated = tracked.updated
    if tracked.invalidated is not None:
        contents = _empty_documents(tracked, description)
        _write_documents(tracked, contents)
        layout = contents[files.LAYOUT]
        remove(tracked, files.SUMMARY)
    elif tracked.state_only and "close" in event.effects and tracked.summary is not None:
        tracked.summary = legacy.renewed_summary(tracked.summary, time.time())
        _write_documents(tracked, {files.SUMMARY: tracked.summary})
    if subscription.current is not None:
        _or_else(None, subscription.current.after, tracked, layout, description)
    _write_state(tracked, description)
    _log(tracked, description)
    _measure(tracked, runner, event, description, figures)
    if event.is_start and tracked.problem is None and tracked.captured is not None:
        once.info(
            f"published {tracked.slot.name} {event.kind}",
            "%s: %d tensors of slot %s are in %s",
            event.kind,
            len(tracked.captured.tensors),
            tracked.slot.name,
            tracked.slot.path(files.LAYOUT),
        )


def tell_news(tracked: Tracked) -> Optional[float]:
    """Remote readers are told that the device has done what it was asked, and the state file says
    what has become of subscribers that were late.  Under the mutex, no event.

    Gives the seconds after which the device is to be asked again, None where it has answered.
    """
    if tracked.unproven is not None:
        _tell_remote_readers(tracked, tracked.unproven.content)
    if subscription.current is not None and subscription.current.take_news(tracked):
        last = subscription.current.last_event(tracked)
        if last is not None:
            _write_state(tracked, dict(last))
    if tracked.unproven is None:
        return None
    waited = time.monotonic() - tracked.unproven.since
    return min(max(waited / 4, 0.005), 1.0)  # a stream that stays unknown costs nothing for ever


def say_unannounced(tracked: Tracked) -> None:
    names = ", ".join(tracked.changes.names)
    once.warn(
        "unannounced " + tracked.slot.name,
        "weights of slot %s have moved without a call that is known to move them (%s); "
        "the new map is published",
        tracked.slot.name,
        names,
    )


def checked(tracked: Tracked, now: float) -> None:
    """Map and memory were found equal: the header says when.  Under the mutex."""
    tracked.checked_at = now
    if tracked.header is not None:
        try:
            tracked.header.write(tracked.header.last._replace(checked_at=now))
        except OSError as error:
            once.warn("write " + tracked.slot.name, "cannot write the header: %s", error)
        _tell_remote_readers(tracked, tracked.header.last)
    metrics.checked(tracked.slot.name, tracked.role, now)


def withdraw(tracked: Tracked) -> None:
    """The runner is gone: nothing of it stays, where the slot is still ours."""
    if subscription.current is not None:
        subscription.current.gone(tracked)
    if tracked.memory_header is not None:
        tracked.memory_header.leave()
    if tracked.slot.is_ours():
        if tracked.header is not None:
            tracked.header.leave()
        for name in (*files.DOCUMENTS, files.HEADER):
            remove(tracked, name)
    let_go(tracked)
    metrics.forget(tracked.slot.name, tracked.role)


def let_go(tracked: Tracked) -> None:
    """Close what is open, and write nothing: in a forked child it is the parent's."""
    if tracked.header is not None:
        tracked.header.abandon()
        tracked.header = None
    tracked.slot.abandon()


def _measure(
    tracked: Tracked,
    runner: Any,
    event: Event,
    description: dict[str, Any],
    figures: Optional[dict[str, Any]],
) -> None:
    """SGLang's own /metrics, where it serves one.  ``figures``: the layout's ``memory``."""
    ended = metrics.Ended(
        instance=tracked.instance,
        kind=event.kind,
        starts=event.is_start,
        state=tracked.state,
        layout_generation=tracked.layout_generation,
        content_generation=tracked.content_generation,
        physical_epoch=tracked.physical_epoch,
        kv_physical_epoch=tracked.kv_physical_epoch,
        success=event.success,
        started_at=event.started_at,
        finished_at=description["finished_at"],
        checked_at=tracked.checked_at,
        weights_bytes=sum(tracked.storages.weights.values()) if tracked.captured else None,
        memory=figures,
        capture_seconds=tracked.capture_seconds,
        lock_status=tracked.slot.lock_status,
    )
    metrics.update(runner, tracked.slot.name, tracked.role, ended)


def _describe(
    tracked: Tracked, event: Event, success: Optional[bool], finished_at: Optional[float]
) -> dict[str, Any]:
    over = success is not None
    return document.event(
        event.kind,
        success,
        event.message if over else None,
        event.started_at,
        finished_at,
        tracked.changes if over else None,
        event.calls,
        event.nested,
        round(tracked.capture_seconds, 6) if over else None,
        event.answered,
        event.names,
    )


# --- the documents --------------------------------------------------------------------------


def _documents(
    tracked: Tracked, runner: Any, event: Event, description: dict[str, Any]
) -> dict[str, Any]:
    """Everything to publish after a full capture but the state, by file name."""
    captured = tracked.captured
    assert captured is not None
    now = time.time()
    regions = document.regions_of(captured)
    meta = legacy.weights_meta(captured, tracked.updated)
    sums = legacy.total_weight_meta(meta)
    figures, allocator = _memory(tracked, captured)
    # Once: to count them takes torch half as long as all of this.
    once_built = event.is_start and tracked.settled
    named = _or_else(None, capturing.parameter_count, runner) if once_built else None
    layout = document.layout(
        captured,
        regions,
        tracked.standing(),
        _or_else({**tracked.process}, identity.identity, runner),
        description,
        figures,
        document.validation(captured, named, allocator),
        _or_else(None, _checksums, tracked, runner, captured),
        now,
    )
    contents = {
        files.LAYOUT: layout,
        files.WEIGHTS_META: meta,
        files.TOTAL_META: sums,
        files.MERGED: legacy.merged_weights(captured, regions),
    }
    if not event.is_start:
        tracked.summary = legacy.update_summary(meta, sums, tracked.gpu_id, now)
        contents[files.SUMMARY] = tracked.summary
    return contents


def _empty_documents(tracked: Tracked, description: dict[str, Any]) -> dict[str, Any]:
    empty = document.invalidated(
        tracked.standing(), tracked.process, tracked.invalidated or "", description, time.time()
    )
    return {
        files.LAYOUT: empty,
        files.WEIGHTS_META: {},
        files.TOTAL_META: {},
        files.MERGED: [],
    }


def _memory(tracked: Tracked, captured: Capture) -> tuple[dict[str, Any], Optional[dict[str, int]]]:
    """The ``memory`` figures, and the allocator's part of ``validation``."""
    found = _or_else(None, memory.device, captured.device_type, captured.device_index)
    mine = tracked.storages.all()
    others = tracked.others(tracked)
    theirs = {
        start: size
        for other in others
        for start, size in other.storages.all().items()
        if start not in mine
    }
    figures = memory.account(found, *tracked.storages, theirs, tracked.released_bytes())
    figures.update(_shared(tracked, others))
    figures["off_device_bytes"] = sum(captured.off_device.values())
    return figures, memory.reconcile(found, {**theirs, **mine})


def _shared(tracked: Tracked, others: list[Tracked]) -> dict[str, Any]:
    """What slots of this process have in common, so that a sum counts it once.

    ``shared_bytes`` and ``shared_kv_cache_bytes``: of this slot's, those that a slot loaded
    earlier has too.
    """
    earlier = [one for one in others if one.load_order < tracked.load_order]
    weights = {**tracked.storages.lora, **tracked.storages.weights}
    known = {start for one in earlier for start in one.storages.all()}
    return {
        "shared_with": [one.slot.name for one in others if tracked.shares_storage_with(one)],
        "shared_bytes": sum(size for start, size in weights.items() if start in known),
        "shared_kv_cache_bytes": sum(
            size for start, size in tracked.storages.kv_cache.items() if start in known
        ),
    }


def _checksums(tracked: Tracked, runner: Any, captured: Capture) -> Optional[dict[str, Any]]:
    """Checksums where they are asked for and the memory may be touched.

    Not of volatile tensors: SGLang rewrites those without a call that we see.
    """
    if not settings.load().checksum or tracked.residency[WEIGHTS] == RELEASED:
        return None
    started = time.perf_counter()
    steady = [
        (name, tensor)
        for name, tensor in capturing.live_tensors(runner, captured)
        if name not in captured.volatile
    ]
    by_name = checksum.checksums(steady)
    return {
        "algorithm": checksum.ALGORITHM,
        "content_generation": tracked.content_generation,
        "seconds": round(time.perf_counter() - started, 6),
        "by_name": by_name,
    }


def _or_else(default: Any, ask: Any, *arguments: Any) -> Any:
    """An answer that the map can do without: ``default`` where asking fails."""
    try:
        return ask(*arguments)
    except Exception as error:
        what = getattr(ask, "__name__", "?").strip("_")
        once.warn(f"ask {what}", "%s could not be told: %s", what, type(error).__name__)
        return default


# --- files ------------------------------------------------------------------------------------


def _write_documents(tracked: Tracked, contents: dict[str, Any]) -> None:
    """Write each; one that can't be written is taken away, for it would be out of date."""
    for name, content in contents.items():
        try:
            data = tracked.slot.write(name, content)
            if name == files.LAYOUT:
                tracked.layout_digest = hashlib.sha256(data).hexdigest()[:32]
        except Exception as error:
            tracked.problem = f"{name.format(tracked.slot.name)}: {error}"
            once.warn(
                "write " + tracked.slot.name,
                "cannot publish in %s, SGLang goes on without it: %s",
                tracked.slot.directory,
                error,
            )
            remove(tracked, name)
            if name == files.LAYOUT:
                tracked.layout_digest = ""


def remove(tracked: Tracked, name: str) -> None:
    try:
        tracked.slot.remove(name)
    except OSError as error:
        once.warn("remove " + tracked.slot.name, "an outdated file stays: %s", error)


def _write_state(tracked: Tracked, description: dict[str, Any]) -> None:
    now = time.time()
    try:
        state = document.state(
            tracked.standing(),
            description,
            tracked.process,
            tracked.slot.name,
            tracked.slot.lock_status,
            tracked.missing,
            tracked.problem,
            background.socket_name(),
            now,
            subscription.current.problems(tracked.slot.name) if subscription.current else None,
        )
        tracked.slot.write(files.STATE, state)
    except Exception as error:
        once.warn("write " + tracked.slot.name, "cannot publish the state: %s", error)
        # No state is honest; the one from before the event would not be.
        remove(tracked, files.STATE)
    try:
        _write_header(tracked, now)
    except Exception as error:
        once.warn("write " + tracked.slot.name, "cannot write the header: %s", error)
        remove(tracked, files.HEADER)


def _write_header(tracked: Tracked, now: float) -> None:
    who = tracked.process
    content = Header(
        sequence=2,
        pid=who["pid"],
        state=tracked.state,
        process_start_ticks=who["process_start_ticks"] or 0,
        boot_id=who["boot_id"] or "",
        layout_generation=tracked.layout_generation,
        content_generation=tracked.content_generation,
        physical_epoch=tracked.physical_epoch,
        kv_physical_epoch=tracked.kv_physical_epoch,
        updated_at=now,
        checked_at=tracked.checked_at,
        layout_digest=tracked.layout_digest,
        instance=tracked.instance,
    )
    _tell_remote_readers(tracked, content)
    path = tracked.slot.path(files.HEADER)
    if tracked.header is not None and tracked.header.path == path and tracked.header.is_in_place():
        tracked.header.write(content)
        return
    if tracked.header is not None:
        tracked.header.leave()  # who has the old file mapped is not to poll it for ever
        tracked.header = None
    if tracked.slot.is_ours():
        tracked.header = header.HeaderFile(path, content)


def _tell_remote_readers(tracked: Tracked, content: Header) -> None:
    """The header in memory; `updating` until the device has done what it was asked.

    The background thread asks again.  A reader on this machine asks the control socket, which
    hands out nothing before.
    """
    if tracked.memory_header is None:
        return
    waits = content.state not in (UPDATING, RELEASED) and not _has_device_written(tracked)
    since = time.monotonic() if tracked.unproven is None else tracked.unproven.since
    tracked.unproven = Unproven(content, since) if waits else None
    tracked.memory_header.write(content._replace(state=UPDATING) if waits else content)


def _has_device_written(tracked: Tracked) -> bool:
    """Waits for nothing."""
    try:
        with tracked.device.handing_out(tracked.context):
            return tracked.device.why_not_done() is None
    except Exception as error:
        once.warn("order " + tracked.slot.name, "the device cannot be asked: %r", error)
        return False


def _log(tracked: Tracked, description: dict[str, Any]) -> None:
    """One line of the event log; without it the map is as true as ever."""
    if not tracked.slot.is_ours():
        return
    try:
        event_log.EventLog(tracked.slot.directory, tracked.slot.name).append(
            document.event_line(tracked.standing(), description, tracked.process, time.time())
        )
    except OSError as error:
        once.warn("write " + tracked.slot.name, "the event log is not written: %s", error)
