"""The GPU is named as torch and nvidia-smi name it."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from tests.unit.fake_sglang import FakeRunner

torch: Any = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("maps"),
]


def test_the_gpu_is_named_as_torch_names_it(runner: FakeRunner, layout: Any) -> None:
    properties = torch.cuda.get_device_properties(runner.gpu_id)
    owner = layout["identity"]
    if not hasattr(properties, "uuid"):
        pytest.skip("this torch tells no UUID")
    assert owner["gpu_uuid"] == "GPU-" + str(properties.uuid).replace("GPU-", "")
    domain, bus, place = owner["pci_bus_id"].split(":")
    assert int(bus, 16) == properties.pci_bus_id
    assert int(domain, 16) == properties.pci_domain_id
    assert int(place.partition(".")[0], 16) == properties.pci_device_id


def test_the_gpu_is_named_as_nvidia_smi_names_it(layout: Any) -> None:
    command = ["nvidia-smi", "--query-gpu=uuid,pci.bus_id", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no nvidia-smi: {error}")
    if asked.returncode:
        pytest.skip(f"nvidia-smi says {asked.stdout}{asked.stderr}")
    devices = dict(line.split(", ") for line in asked.stdout.splitlines() if ", " in line)
    owner = layout["identity"]
    assert owner["gpu_uuid"] in devices, devices
    # nvidia-smi writes the domain with eight digits, the driver with four.
    said = devices[owner["gpu_uuid"]].strip().lower()
    assert said.lstrip("0") == owner["pci_bus_id"].lower().lstrip("0")
