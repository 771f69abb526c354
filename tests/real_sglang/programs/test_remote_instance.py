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
from tests.real_sglang.hooked import assert_true_map
from tests.real_sglang.truth.comparison import compare
from tests.real_sglang.truth.outside_bytes import settled_maps
from tests.real_sglang.truth.report import OtherProcess, other_process
from tests.real_sglang.truth.serving import ServedOverHttp, make_probed_venv

pytestmark = [pytest.mark.real_sglang, pytest.mark.truth]

OPTION = "--remote-instance-weight-loader-"
STAND_IN = "`cuda_stand_in.py` for CUDA's allocator, whose blocks SGLang's source registers"
VARIABLES = {"MOONCAKE_PROTOCOL": "tcp", "MC_FORCE_TCP": "1", "SGLANG_HOST_IP": HOST}


@pytest.fixture(scope="module")
def python(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hooked interpreter with SGLang, Mooncake and the stand-in."""
    engines = environment.purelib.parents[3] / "engines"
    if not (engines / "mooncake").is_dir():
        pytest.skip("Mooncake is installed by tests/real_sglang/test_transfer.py, and is not there")
    found = make_probed_venv(tmp_path_factory.mktemp("with_mooncake") / "venv", environment)
    (purelib,) = found.parents[1].glob("lib/python*/site-packages")
    (purelib / "zzz_engines.pth").write_text(f"{engines}\n")
    shutil.copy(Path(__file__).with_name("cuda_stand_in.py"), purelib)
    (purelib / "zzzz_stand_in.pth").write_text("import cuda_stand_in; cuda_stand_in.start()\n")
    return found


def values(server: ServedOverHttp, row: OtherProcess, when: str) -> dict[tuple[str, str], bytes]:
    """The parameters that a server publishes, read by this process and held against the probe."""
    (published,) = settled_maps(server.map_directory, 1)
    assert published.state["missing"] == []
    moment = compare([published], server, server.probe)
    row.look_by_probe(when, moment)
    assert moment.by_sglang > 0
    return moment.parameters()


def test_what_a_server_loads_from_another_is_what_both_publish(
    environment: Environment, python: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    ports = [free_port(), free_port()]
    with (
        other_process(
            "a server that loads from another's memory, and that other",
            "`--load-format remote_instance`, Mooncake over TCP",
            STAND_IN,
        ) as row,
        ServedOverHttp(
            environment,
            python,
            checkpoint(1),
            tmp_path / "source",
            [
                f"{OPTION}start-seed-via-transfer-engine",
                *("--engine-info-bootstrap-port", str(ports[0])),
            ],
            VARIABLES,
            tp=1,
            replicas=1,
        ) as source,
    ):
        before = values(source, row, "the source's load")
        generation = source.maps.slot("0").read().content_generation
        with ServedOverHttp(
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
            tp=1,
            replicas=1,
        ) as receiver:
            document = receiver.maps.slot("0").read()
            assert document.state["state"] == "ready"
            assert document.raw["identity"]["model_path"] == str(checkpoint(2))
            (truth,) = receiver.live()
            assert_true_map(document, truth)
            assert values(receiver, row, "the receiver's load") == before
        # Its weights were read, and nothing of it has changed.
        assert values(source, row, "the source afterwards") == before
        document = source.maps.slot("0").read()
        assert document.content_generation == generation
        assert document.state["state"] == "ready"
        # The receiver's own checkpoint, for comparison.
        assert source.update_weights_from_disk(checkpoint(2))[0] == 200
        assert values(source, row, "update of the source from disk") != before
