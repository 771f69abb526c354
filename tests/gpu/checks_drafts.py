"""Checks of speculative decoding: a draft beside its target in one process."""

from __future__ import annotations

from pathlib import Path

from tests.gpu import checkpoint_bytes
from tests.gpu.gpu_server import GpuServer, make_checkpoint
from tests.gpu.map_checks import Report, check_bytes, check_geometry, check_memory


def speculative(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """A draft in the same process: two slots, both right, shared storage counted once."""
    arguments = [
        "--speculative-algorithm", "STANDALONE",
        "--speculative-draft-model-path", str(b),
        "--speculative-num-steps", "2",
        "--speculative-eagle-topk", "1",
        "--speculative-num-draft-tokens", "3",
    ]  # fmt: skip
    with GpuServer(python, a, folder, arguments) as server:
        print(f"server up after {server.startup_seconds:.0f} s", flush=True)
        slots = {slot.name: slot for slot in server.maps.slots()}
        with report.check("target and draft have a slot each") as seen:
            assert set(slots) == {"0", "0_draft"}
            documents = {name: slot.read() for name, slot in slots.items()}
            for document in documents.values():
                assert document.state["state"] == "ready"
                check_geometry(document, seen)
            seen.update({name: len(document.tensors) for name, document in documents.items()})
            seen.update(shared=documents["0_draft"].raw["memory"]["shared_with"])
        with report.check("target's and draft's bytes") as seen:
            check_bytes(server, "0", a, seen)
            held = server.bytes_by_slot()["0_draft"]
            wanted = checkpoint_bytes.expected(b)
            target = checkpoint_bytes.expected(a)
            for name, found in held.items():
                if name in wanted:
                    assert found in (wanted[name], target[name]), name
            seen["draft tensors that are the target's own"] = sum(
                1 for name, found in held.items() if target.get(name) == found != wanted.get(name)
            )
        with report.check("accounting of both") as seen:
            for document in documents.values():
                check_memory(document, seen)


def eagle(report: Report, python: Path, a: Path, b: Path, folder: Path) -> None:
    """A draft that serves with the target's own embedding and head."""
    folder.mkdir(parents=True)
    target, draft = folder / "target", folder / "draft"
    make_checkpoint(python, target, 1, "--architecture", "llama")
    make_checkpoint(python, draft, 2, "--architecture", "llama_eagle", "--layers", "1")
    arguments = [
        "--speculative-algorithm", "EAGLE",
        "--speculative-draft-model-path", str(draft),
        "--speculative-num-steps", "2",
        "--speculative-eagle-topk", "1",
        "--speculative-num-draft-tokens", "3",
    ]  # fmt: skip
    with GpuServer(python, target, folder / "server", arguments) as server:
        slots = {slot.name: slot for slot in server.maps.slots()}
        with report.check("EAGLE: target and draft have a slot each, both settled") as seen:
            assert set(slots) == {"0", "0_draft"}
            documents = {name: slot.read() for name, slot in slots.items()}
            for name, document in documents.items():
                assert document.state["state"] == "ready"
                check_geometry(document, {})
                seen[name] = len(document.tensors)
        with report.check("EAGLE: target's and draft's bytes") as seen:
            check_bytes(server, "0", target, seen)
            held = server.bytes_by_slot()["0_draft"]
            own = checkpoint_bytes.expected(draft)
            wanted = {f"model.{name}": found for name, found in own.items()}
            assert {name: held[name] for name in wanted} == wanted
            seen["draft equal"] = len(wanted)
        with report.check("EAGLE: shared embedding and head are counted once") as seen:
            one, other = (documents[name] for name in ("0", "0_draft"))
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                assert one.tensors[name]["ptr"] == other.tensors[name]["ptr"], name
            storages = {
                (tensor["storage_ptr"], tensor["storage_size"])
                for document in documents.values()
                for tensor in document.tensors.values()
            }
            counted = sum(
                document.memory["weights_bytes"] - document.memory["shared_bytes"]
                for document in documents.values()
            )
            assert counted == sum(size for _, size in storages)
            seen.update(counted=counted, shared=other.memory["shared_bytes"])
        with report.check("EAGLE: both right after an update of the target") as seen:
            status, answer = server.update_weights_from_disk(target)
            assert status == 200, answer
            for name, slot in slots.items():
                document = slot.read()
                assert document.state["state"] == "ready", document.state
                assert document.layout_generation == documents[name].layout_generation
                check_geometry(document, {})
            check_bytes(server, "0", target, seen)
