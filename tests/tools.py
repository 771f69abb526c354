"""Make the venv that the tests and linters run in: ``python3 tests/tools.py .cache/tools``.

It gets the packages of pyproject.toml's ``dev`` extra and the transfer engines, but not the project
itself: its start-up hook must be off in the process that tests it.  Its ``sys.path`` goes on in the
venv that holds torch and SGLang.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cpu_sglang.environment import ensure_environment  # noqa: E402


def packages(extra: str) -> list[str]:
    """The requirements of an extra; one that names this project stands for its extras'."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: list[str] = []
    for requirement in project["optional-dependencies"][extra]:
        if requirement.startswith(project["name"] + "["):
            names = requirement.partition("[")[2].partition("]")[0].split(",")
            for name in names:
                found += packages(name.strip())
        else:
            found.append(requirement)
    return found


def main() -> None:
    venv = Path(sys.argv[1])
    environment = ensure_environment()
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "-q"]
    print("installing the test tools ...", flush=True)
    pip.append("--disable-pip-version-check")
    subprocess.run([*pip, *packages("dev")], check=True)
    purelib = next(venv.glob("lib/python*/site-packages"))
    (purelib / "zz_sglang.pth").write_text(f"{environment.purelib}\n")
    # From here on there is torch, which NIXL's package asks for: without it pip would bring CUDA's.
    subprocess.run([*pip, *packages("mooncake"), *packages("nixl")], check=True)


if __name__ == "__main__":
    main()
