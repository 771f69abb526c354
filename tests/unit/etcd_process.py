"""A real etcd, started without root on free ports; it keeps its data when it is started again."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_weight_hook.fleet.etcd import PREFIX, EtcdError

ETCD = shutil.which("etcd")


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


class EtcdServer:
    def __init__(
        self,
        folder: Path,
        certificate: Path | None = None,
        key: Path | None = None,
        clients: Path | None = None,
        host: str = "127.0.0.1",
    ):
        """``clients``: the authority of client certificates, without which nobody is let in."""
        if ETCD is None:
            pytest.skip("no etcd here: install Debian's etcd-server")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        scheme = "http" if certificate is None else "https"
        self.host = host
        self.url = f"{scheme}://{host}:{free_port()}"
        peer = f"http://127.0.0.1:{free_port()}"
        self._command = [
            *(ETCD, "--data-dir", str(folder / "data"), "--log-level", "error"),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"default={peer}"),
        ]
        if certificate is not None:
            self._command += ["--cert-file", str(certificate), "--key-file", str(key)]
        if clients is not None:
            self._command += ["--client-cert-auth", "--trusted-ca-file", str(clients)]
        self.start()

    def start(self) -> None:
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        port = int(self.url.rpartition(":")[2])
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection((self.host, port), 1).close()
                break
            except OSError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Let it stand still: connections are accepted, and nobody is answered."""
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)  # all of its threads

    def go_on(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def post(self, path: str, **asked: Any) -> Any:
        """As an administrator before there is any authentication."""
        request = urllib.request.Request(
            f"{self.url}/v3/{path}", json.dumps(asked).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)


def a_certificate(
    folder: Path, name: str = "localhost", has_common_name: bool = True
) -> tuple[Path, Path]:
    """A self-signed certificate for this machine, and its key (PEM)."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here: install openssl")
    folder.mkdir(parents=True, exist_ok=True)
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", f"/{'CN' if has_common_name else 'O'}={name}"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


def answered(ask: Callable[[], Any]) -> Any:
    """The answer of an etcd that has been started again, and has no leader for a moment."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return ask()
        except EtcdError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def with_users(etcd: EtcdServer) -> None:
    """A user who may have what is ours, another who may not, and nobody else."""
    reach = f"{PREFIX[:-1]}0"
    etcd.post("auth/role/add", name="agent")
    etcd.post(
        "auth/role/grant",
        name="agent",
        perm={"permType": "READWRITE", "key": coded(PREFIX), "range_end": coded(reach)},
    )
    for name, role in (("root", "root"), ("agent", "agent"), ("other", None)):
        etcd.post("auth/user/add", name=name, password=f"password-of-{name}")
        if role == "root":
            etcd.post("auth/role/add", name="root")
        if role is not None:
            etcd.post("auth/user/grant", user=name, role=role)
    etcd.post("auth/enable")


def coded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
