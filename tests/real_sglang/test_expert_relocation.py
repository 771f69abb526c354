"""Expert relocation (EPLB) by SGLang's own classes: one event, however the calls nest.

SGLang 0.5.23's ``ExpertLocationUpdater`` and ``update_expert_location_with_recovery``, hooked as
in a server, move real tensors in one process; only the runner and its model are stand-ins.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from cpu_sglang.environment import Environment

pytestmark = pytest.mark.real_sglang

ROOT = Path(__file__).resolve().parents[2]

RELOCATE = """
import json, sys, time
import sglang_patch_loader
sglang_patch_loader.install()

import torch
import torch.distributed
from sglang.srt.eplb import eplb_manager, expert_location
from sglang.srt.eplb.expert_location_updater import ExpertLocationUpdater
from sglang.srt.runtime_context import get_parallel

from fake_sglang import FakeRunner, load, settle

torch.distributed.init_process_group(
    "gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1
)
get_parallel().override_permanently(nnodes=1)
if not hasattr(torch.cpu, "empty_cache"):  # asked of whatever device there is
    torch.cpu.empty_cache = lambda: None


def metadata(experts):
    places = torch.tensor([experts])
    all_places = torch.full((1, 4, 4), -1)
    for place, expert in enumerate(experts):
        all_places[0, expert, 0] = place
    return expert_location.ExpertLocationMetadata(
        physical_to_logical_map=places,
        physical_to_logical_map_cpu=places,
        logical_to_all_physical_map=all_places,
        logical_to_all_physical_map_cpu=all_places,
        logical_to_all_physical_map_num_valid=torch.ones(1, 4, dtype=torch.int64),
        ep_size=1,
        logical_to_rank_dispatch_physical_map=None,
    )


model = torch.nn.Module()
model.w13 = torch.nn.Parameter(torch.arange(4.0).repeat_interleave(6).view(4, 6))
model.w2 = torch.nn.Parameter(torch.arange(4.0).repeat_interleave(3).view(4, 3))
model.routed_experts_weights_of_layer = {0: [model.w13.data, model.w2.data]}
runner = FakeRunner(model)
load(runner)
settle()
expert_location.set_global_expert_location_metadata(metadata([0, 1, 2, 3]))


def published():
    with open(sys.argv[2] + "/weight_state_0.json") as file:
        return json.load(file)


seen = [published()]
with torch.no_grad():
    eplb_manager.update_expert_location_with_recovery(
        expert_location_updater=ExpertLocationUpdater(),
        model=model,
        new_expert_location_metadata=metadata([2, 0, 3, 1]),
        update_layer_ids=[0],
        tp_rank=0,
        expert_backup_client=None,
        update_weights_from_disk_callable=None,
        ep_dispatch_algorithm="lp",
        # Called when the experts have moved and the outer function has not returned yet.
        init_lplb_solvers_callable=lambda: seen.append(published()),
    )
deadline = time.monotonic() + 30  # a relocation may be followed by another: it is over when quiet
while published()["state"] == "updating" and time.monotonic() < deadline:
    time.sleep(0.01)
seen.append(published())
print(json.dumps({"experts": model.w2[:, 0].tolist(), "seen": seen}))
"""


def test_a_relocation_is_one_event_that_changes_contents_and_no_address(
    environment: Environment, tmp_path: Path
) -> None:
    maps = tmp_path / "maps"
    done = subprocess.run(
        [str(environment.python), "-c", RELOCATE, str(tmp_path / "rendezvous"), str(maps)],
        env=environment.env(
            {"SGLANG_WEIGHT_HOOK_DIR": str(maps)}, python_path=[ROOT, ROOT / "tests" / "unit"]
        ),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["experts"] == [2.0, 0.0, 3.0, 1.0]  # SGLang did move them
    before, during, after = answer["seen"]
    assert before["state"] == "ready"
    assert during["state"] == "updating"
    assert during["event"]["kind"] == "expert_location_update"
    assert after["state"] == "ready"
    assert after["event"]["success"] is True
    # The function and, inside it, the method.
    assert after["event"]["calls"] == 2
    assert after["event"]["nested"] == {}  # for both are of one kind
    assert after["content_generation"] == before["content_generation"] + 1
    assert after["layout_generation"] == before["layout_generation"]
