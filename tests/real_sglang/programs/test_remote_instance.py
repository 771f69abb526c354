"""A server that loads its weights from another server's memory, and that other server.

SGLang's own loader over Mooncake and TCP (``--load-format remote_instance``); what CUDA's allocator
would say is a stand-in's word (`cuda_stand_in`).  The receiver is given a checkpoint with
other values, so what it holds can only be the source's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cpu_sglang.environment import Environment
from cpu_sglang.server import HOST, free_port
from tests.real_sglang.hooked import HookedServer, assert_true_map, make_venv
from tests.real_sglang.truth.outside_bytes import Place, settled_maps

pytestmark = [pytest.mark.real_sglang, pytest.mark.truth]

OPTION = "--remote-instance-weight-loader-"
VARIABLES = {"MOONCAKE_PROTOCOL": "tcp", "MC_FORCE_TCP": "1", "SGLANG_HOST_IP": HOST}


@pytest.fixture(scope="module")
def python(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hooked interpreter with SGLang, Mooncake and the stand-in."""
    engines = environment.purelib.parents[3] / "engines"
    if not (engines / "mooncake").is_dir():
        pytest.skip("Mooncake is installed by tests/real_sglang/test_transfer.py, and is not there")
    found = make_venv(tmp_path_factory.mktemp("with_mooncake") / "venv", environment)
    (purelib,) = found.parents[1].glob("lib/python*/site-packages")
    (purelib / "zzz_engines.pth").write_text(f"{engines}\n")
    shutil.copy(Path(__file__).with_name("cuda_stand_in.py"), purelib)
    (purelib / "zzzz_stand_in.pth").write_text("import cuda_stand_in; cuda_stand_in.start()\n")
    return found


def values(folder: Path) -> dict[str, bytes]:
    """The parameters that a server publishes, read by this process."""
    (published,) = settled_maps(folder / "weights_metadata", 1)
    assert published.state["missing"] == []
    with published.held():
        return {
            name: Place.of(tensor).read(published.pid)
            for name, tensor in published.tensors.items()
            if tensor["kind"] == "parameter"
        }


def test_what_a_server_loads_from_another_is_what_both_publish(
    environment: Environment, python: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    ports = [free_port(), free_port()]
    with HookedServer(
        environment,
        python,
        checkpoint(1),
        tmp_path / "source",
        [f"{OPTION}start-seed-via-transfer-engine", "--engine-info-bootstrap-port", str(ports[0])],
        VARIABLES,
    ) as source:
        before = values(tmp_path / "source")
        generation = source.maps.slot("0").read().content_generation
        with HookedServer(
            environment,
            python,
            checkpoint(2),
            tmp_path / "receiver",
            [
                *("--load-format", "remote_instance", f"{OPTION}backend", "transfer_engine"),
                *(f"{OPTION}seed-instance-ip", HOST),
                *(f"{OPTION}seed-instance-service-port", str(source.port)),
                *("--engine-info-bootstrap-port", str(ports[1])),
            ],
            VARIABLES,
        ) as receiver:
            document = receiver.maps.slot("0").read()
            assert document.state["state"] == "ready"
            assert document.raw["identity"]["model_path"] == str(checkpoint(2))
            (truth,) = receiver.live()
            assert_true_map(document, truth)
            assert values(tmp_path / "receiver") == before
        # Its weights were read, and nothing of it has changed.
        assert values(tmp_path / "source") == before
        document = source.maps.slot("0").read()
        assert document.content_generation == generation
        assert document.state["state"] == "ready"
        # The receiver's own checkpoint, for comparison.
        assert source.update_weights_from_disk(checkpoint(2))[0] == 200
        assert values(tmp_path / "source") != before
