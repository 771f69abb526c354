"""Sends new weights to a running server the way a trainer does, without a file.

Every round starts at checkpoint A, sends checkpoint B over one route, and asks the
server whether it now speaks as B.  One JSON line per request on stdout:

    {"route": "/update_weights_from_tensor", "step": "tensor 1/2", "status": 200,
     "success": true, "message": "Success", "speaks_as_b": null}

``speaks_as_b`` is null where the question makes no sense (the update is not complete
yet).  Exits with 1 if any round that the release supports did not end at B.

Runs in the venv (torch and safetensors), with the variables of ``Environment.env``:

    <venv python> -m cpu_sglang.online_updates --port PORT A B [--tp 2] [--buckets 3]
"""

from __future__ import annotations

import argparse
import base64
import importlib
import io
import json
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
GROUP = "trainer"
TIMEOUT = timedelta(seconds=90)
JOIN_TIMEOUT = timedelta(seconds=30)
ROUTES = ("tensor", "flattened", "distributed")
# Tokens, not text: the answer then depends on nothing but weights.
PROMPT = [75, 104, 111, 111, 114]

NamedTensors = list[tuple[str, Any]]


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any

    @property
    def success(self) -> bool:
        said = self.body.get("success", True) if isinstance(self.body, dict) else True
        return self.status == 200 and bool(said)

    @property
    def is_unknown_route(self) -> bool:
        return self.status in (404, 405)

    @property
    def message(self) -> str:
        message = self.body.get("message", "") if isinstance(self.body, dict) else self.body
        return str(message or "")[:300]


class Trainer:
    """The other side of the server's update routes."""

    def __init__(self, port: int, a: Path, b: Path, *, tp: int, buckets: int, one: bool) -> None:
        self.url = f"http://{HOST}:{port}"
        self.a, self.tp, self.one_per_request = a, tp, one
        self.new_weights = _load_checkpoint(b)
        self.buckets = _split(self.new_weights, buckets)
        self.failed: list[str] = []
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self._reload("baseline", b)
        self.answer_of_b = self.generate()
        self._reload("baseline", a)
        if self.generate() == self.answer_of_b:
            raise SystemExit("both checkpoints generate the same answer: updates cannot be seen")

    # -- rounds -------------------------------------------------------------

    def tensor(self) -> None:
        """Serialised tensors, as many requests as there are buckets."""
        self._tensor_round("tensor", None, lambda bucket: bucket)

    def flattened(self) -> None:
        """One byte tensor per bucket and a description of what lies where in it."""
        try:
            from sglang.srt.weight_sync.tensor_bucket import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
                FlattenedTensorBucket,
            )
        except ImportError:
            self._skip("flattened", "this release has no flattened buckets")
            return

        def flatten(bucket: NamedTensors) -> dict[str, Any]:
            flat = FlattenedTensorBucket(named_tensors=bucket)
            return {
                "flattened_tensor": flat.get_flattened_tensor(),
                "metadata": flat.get_metadata(),
            }

        # (Older buckets hold one dtype each; tiny_model's checkpoints have only one.)
        self._tensor_round("flattened", "flattened_bucket", flatten)

    def distributed(self) -> None:
        """A gloo broadcast from here to every rank of the server."""
        import torch.distributed as dist  # type: ignore[import-not-found, unused-ignore]

        with self._update_group() as group:
            if group is None:
                return
            with self._session("distributed"):
                requests = [[pair] for pair in self.new_weights]
                requests = requests if self.one_per_request else self.buckets
                for number, bucket in enumerate(requests, 1):
                    step = f"distributed {number}/{len(requests)}"
                    # The server receives while it answers, so the request must be under
                    # way while this side sends.
                    with ThreadPoolExecutor(1) as background:
                        request = background.submit(
                            self._post, "/update_weights_from_distributed", self._describe(bucket)
                        )
                        for _, tensor in bucket:
                            dist.broadcast(tensor, src=0, group=group)
                        self._say("/update_weights_from_distributed", step, request.result())
            self._conclude("distributed")

    def _tensor_round(
        self,
        name: str,
        load_format: str | None,
        pack: Callable[[NamedTensors], Any],
    ) -> None:
        buckets = self.buckets
        with self._session(name):
            for number, bucket in enumerate(buckets, 1):
                body = {
                    # One payload per rank: the handle to shared memory that it holds is
                    # used up by the first process that opens it.
                    "serialized_named_tensors": [
                        _serialise(pack([(key, tensor.clone()) for key, tensor in bucket]))
                        for _ in range(self.tp)
                    ],
                    "load_format": load_format,
                    "flush_cache": number == len(buckets),
                }
                answer = self._post("/update_weights_from_tensor", body)
                self._say("/update_weights_from_tensor", f"{name} {number}/{len(buckets)}", answer)
        self._conclude(name)

    @contextmanager
    def _session(self, name: str) -> Iterator[None]:
        """Since 0.5.21 an update is announced and concluded; before, it just happens."""
        begun = self._post("/begin_weight_update", {})
        if begun.is_unknown_route:
            yield
            return
        self._say("/begin_weight_update", name, begun)
        try:
            yield
        finally:
            self._say("/end_weight_update", name, self._post("/end_weight_update", {}))

    @contextmanager
    def _update_group(self) -> Iterator[Any]:
        port = _free_port()
        request = {
            "master_address": HOST,
            "master_port": port,
            "rank_offset": 1,
            "world_size": 1 + self.tp,
            "group_name": GROUP,
            "backend": "gloo",
        }
        with ThreadPoolExecutor(1) as background:
            joining = background.submit(self._post, "/init_weights_update_group", request)
            try:
                group = _join_group(port, 1 + self.tp)
            except RuntimeError:  # no rank joined: the server's answer says why
                group = None
            joined = joining.result()
        self._say("/init_weights_update_group", "distributed", joined)
        if group is None or not joined.success:
            self.failed.append("distributed")
            yield None
            return
        yield group
        left = self._post("/destroy_weights_update_group", {"group_name": GROUP})
        if not left.is_unknown_route:  # 0.5.3 and older keep the group for good
            self._say("/destroy_weights_update_group", "distributed", left)

    def _describe(self, bucket: NamedTensors) -> dict[str, Any]:
        dtypes = [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket]
        shapes = [list(tensor.shape) for _, tensor in bucket]
        if self.one_per_request:
            return {"name": bucket[0][0], "dtype": dtypes[0], "shape": shapes[0]}
        names = [name for name, _ in bucket]
        return {"names": names, "dtypes": dtypes, "shapes": shapes, "group_name": GROUP}

    # -- talking ------------------------------------------------------------

    def generate(self) -> Any:
        sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        answer = self._post("/generate", {"input_ids": PROMPT, "sampling_params": sampling})
        if not answer.success:
            raise SystemExit(f"/generate answered {answer.status}: {answer.message}")
        return answer.body.get("output_ids") or answer.body["text"]

    def _conclude(self, name: str) -> None:
        """Say whether the round arrived at B, and go back to A for the next one."""
        arrived = self.generate() == self.answer_of_b
        if not arrived:
            self.failed.append(name)
        self._write("/generate", name, 200, True, speaks_as_b=arrived)
        self._reload(name, self.a)

    def _reload(self, step: str, checkpoint: Path) -> None:
        self._post("/flush_cache", {})
        answer = self._post("/update_weights_from_disk", {"model_path": str(checkpoint)})
        self._say("/update_weights_from_disk", step, answer)

    def _skip(self, step: str, why: str) -> None:
        self._write(None, step, None, None, why)

    def _say(self, route: str, step: str, answer: Answer) -> None:
        self._write(route, step, answer.status, answer.success, answer.message)

    @staticmethod
    def _write(
        route: str | None,
        step: str,
        status: int | None,
        success: bool | None,
        message: str = "",
        speaks_as_b: bool | None = None,
    ) -> None:
        line = {
            "route": route,
            "step": step,
            "status": status,
            "success": success,
            "message": message,
            "speaks_as_b": speaks_as_b,
        }
        print(json.dumps(line), flush=True)

    def _post(self, route: str, body: dict[str, Any]) -> Answer:
        request = urllib.request.Request(
            self.url + route,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with self._open(request, timeout=TIMEOUT.total_seconds()) as response:
                return Answer(response.status, _parsed(response.read()))
        except urllib.error.HTTPError as refusal:
            with refusal:
                return Answer(refusal.code, _parsed(refusal.read()))
        except OSError as error:  # the scheduler took the whole server with it
            return Answer(0, repr(error))


def _parsed(content: bytes) -> Any:
    text = content.decode(errors="replace")
    try:
        return json.loads(text)
    except ValueError:
        return text


def _load_checkpoint(directory: Path) -> NamedTensors:
    from safetensors.torch import load_file  # type: ignore[import-not-found, unused-ignore]

    return [
        pair for file in sorted(directory.glob("*.safetensors")) for pair in load_file(file).items()
    ]


def _split(pairs: NamedTensors, buckets: int) -> list[NamedTensors]:
    size = -(-len(pairs) // buckets)
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def _share_memory_with_strangers() -> None:
    """Choose how torch hands tensors to a process that is no child of ours: by name.

    By file descriptor, its default, the server's scheduler dies trying: it may not have
    ours.  Sharing by name starts a daemon that lives as long as the server holds the
    memory, with our stdout: a reader of that to its end would wait for the server to
    end.  So it is started now, while stdout and stderr lead nowhere.
    """
    torch: Any = importlib.import_module("torch")
    importlib.import_module("torch.multiprocessing").set_sharing_strategy("file_system")
    sys.stdout.flush()
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in kept:
            os.dup2(nowhere, stream)
        torch.zeros(1).share_memory_()
    finally:
        for stream, original in kept.items():
            os.dup2(original, stream)
            os.close(original)
        os.close(nowhere)


def _serialise(content: Any) -> str:
    """What SGLang's own serialiser makes of it."""
    from multiprocessing.reduction import ForkingPickler

    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(content)
    return base64.b64encode(buffer.getvalue()).decode()


def _join_group(port: int, world_size: int) -> Any:
    """Rank 0 of a group beside the default one, as SGLang builds it on its side.

    torch has no public call for a group that is not part of an initialised world.
    """
    c10d: Any = importlib.import_module("torch.distributed.distributed_c10d")
    store, _, _ = next(c10d.rendezvous(f"tcp://{HOST}:{port}", 0, world_size, timeout=JOIN_TIMEOUT))
    store.set_timeout(JOIN_TIMEOUT)
    group, _ = c10d._new_process_group_helper(
        world_size,
        0,
        [],
        c10d.Backend("gloo"),
        c10d.PrefixStore(GROUP, store),
        group_name=GROUP,
        timeout=TIMEOUT,
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cpu_sglang.online_updates",
        description="Update a running server's weights from tensors and over gloo.",
    )
    parser.add_argument("a", type=Path, help="the checkpoint that the server was started with")
    parser.add_argument("b", type=Path, help="the checkpoint to send")
    parser.add_argument("--port", type=int, required=True, help="the server's HTTP port")
    parser.add_argument("--tp", type=int, default=1, help="the server's tensor-parallel size")
    parser.add_argument(
        "--buckets", type=int, default=1, help="requests into which an update is split"
    )
    parser.add_argument(
        "--routes",
        nargs="+",
        choices=ROUTES,
        default=list(ROUTES),
        help="update methods to use (default: all)",
    )
    parser.add_argument(
        "--one-weight-per-request",
        action="store_true",
        help="send one weight per request, as SGLang 0.4.7 and older require",
    )
    options = parser.parse_args()
    _share_memory_with_strangers()
    trainer = Trainer(
        options.port,
        options.a,
        options.b,
        tp=options.tp,
        buckets=options.buckets,
        one=options.one_weight_per_request,
    )
    for route in options.routes:
        getattr(trainer, route)()
    return 1 if trainer.failed else 0


if __name__ == "__main__":
    sys.exit(main())
