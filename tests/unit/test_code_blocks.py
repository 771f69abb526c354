"""Every code block of the pages is run, or, where a test cannot run it, held against what it names.

A block that no treatment fits fails, so none can be forgotten.  Commands run beside a process that
publishes a tiny Llama (``tiny_llama``); what they print is compared with what the page shows.

Longer than 500 lines because each kind of block has a treatment of its own.
"""

from __future__ import annotations

import ast
import doctest
import hashlib
import importlib
import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("torch")
pytest.importorskip("typer")

from tiny_llama import TinyLlama

import sglang_weight_hook as hook
from sglang_weight_hook.layout.states import STATES
from sglang_weight_hook.layout.variables import VARIABLES
from tests import code_blocks
from tests.code_blocks import ROOT, Block, Command, difference, parts, shows

BLOCKS = code_blocks.all_blocks()
PACKAGE = ROOT / "sglang_weight_hook"

# What a Python block leaves to its reader to define.
LEFT_OPEN = {
    "register": "def register(ptr, size):\n    assert ptr > 0 < size\n",
}


class Place:
    """A directory as a user has it: the repository's files, and a server's ``weights_metadata``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in os.listdir(ROOT):
            if not name.startswith(".") and name != "weights_metadata":
                (folder / name).symlink_to(ROOT / name)
        programs = folder / ".programs"
        programs.mkdir()
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "SGLANG_WEIGHT_HOOK"))
        }
        self.environment["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
        for name, words in (
            ("python", ""),
            ("python3", ""),
            ("sglang-weight-hook", "-m sglang_weight_hook "),
        ):
            path = f"PYTHONPATH='{ROOT}' " if words else ""
            program = programs / name
            program.write_text(f"#!/bin/sh\n{path}exec '{sys.executable}' {words}\"$@\"\n")
            program.chmod(0o755)
        self.server = TinyLlama(folder)
        self._agent: subprocess.Popen[str] | None = None
        self._agents_url = ""

    def agent(self) -> str:
        """The URL of a node agent over the server's directory, started when it is first needed."""
        if self._agent is None:
            pytest.importorskip("starlette")
            pytest.importorskip("uvicorn")
            command = "exec sglang-weight-hook serve --port 0"
            self._agent = subprocess.Popen(
                ["bash", "-c", command],
                cwd=self.folder,
                env=self.environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert self._agent.stdout is not None
            self._agents_url = self._agent.stdout.readline().split()[1]
        return self._agents_url

    def end(self) -> None:
        if self._agent is not None:
            self._agent.terminate()
            self._agent.communicate()
        self.server.end()

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("pages"))
    yield made
    made.end()


@pytest.fixture
def installed(tmp_path: Path) -> Mapping[str, str]:
    """An environment of its own in which the hook is installed; variables that activate it."""
    return environment_with_hook(tmp_path / "venv")


def environment_with_hook(venv: Path) -> dict[str, str]:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    script = ROOT / "install_sglang_hook_patch.sh"
    subprocess.run([script, "--python", python], check=True, stdout=subprocess.DEVNULL)
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "SGLANG_WEIGHT_HOOK"))
    }
    return {**environment, "PATH": f"{venv}/bin{os.pathsep}{os.environ['PATH']}"}


# Python


def run_python(block: Block, place: Place) -> None:
    names = {node.id for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Name)}
    given = "".join(code for name, code in LEFT_OPEN.items() if name in names)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", given + block.text],
        cwd=place.folder,
        env={**place.environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def public(name: str) -> Any:
    for module in ("", ".reader", ".memory"):
        found = getattr(importlib.import_module(f"sglang_weight_hook{module}"), name, None)
        if found is not None:
            return found
    raise AssertionError(f"there is no public {name}")


def public_class(name: str) -> Any:
    """By its name, or by the instance's name in the reference, which is that in lower case."""
    everything = {*hook.__all__, *hook.reader.__all__, "Memory"}
    (found,) = {each for each in everything if name in (each, each.lower()) and each[0].isupper()}
    return public(found)


def hold_signature(block: Block, place: Place) -> None:
    text = block.text.strip().removeprefix("with ")
    if match := re.fullmatch(r"class (\w+)(?:\((.*)\))?", text):
        found = public(match[1])
        assert inspect.isclass(found)
        bases = re.sub(r"\[.*?\]", "", match[2] or "")
        for base in filter(None, bases.split(", ")):
            names = {each.__name__ for each in found.__mro__}
            assert base in names or (base == "NamedTuple" and issubclass(found, tuple))
        return
    if match := re.fullmatch(r"([A-Z]+) = (.*)", text, re.DOTALL):
        assert public(match[1]) == ast.literal_eval(match[2])
        return
    called = re.match(r"[\w.]+", text)
    assert called, text
    owner, _, name = called[0].rpartition(".")
    found = inspect.getattr_static(public_class(owner), name) if owner else public(name)
    if "(" not in text.partition("->")[0]:
        assert isinstance(found, property) or type(found).__name__ in (
            "cached_property",
            "_tuplegetter",
        )
        return
    found = getattr(found, "__func__", found)  # class methods
    (definition,) = ast.parse(f"def {name}{text[called.end() :]}: pass").body
    assert isinstance(definition, ast.FunctionDef)
    written = [
        argument.arg for argument in ast.walk(definition.args) if isinstance(argument, ast.arg)
    ]
    real = [each for each in inspect.signature(found).parameters if each not in ("self", "cls")]
    assert sorted(written) == sorted(real)


def run_doctest(block: Block, place: Place) -> None:
    names = {each: public(each) for each in hook.reader.__all__}
    test = doctest.DocTestParser().get_doctest(block.text, names, str(block), None, None)
    assert test.examples
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)


# Data


def parse_json(block: Block, place: Place) -> None:
    text = block.text.strip().rstrip(",")
    value = json.loads(text if text.startswith(("{", "[")) else "{" + text + "}")
    assert isinstance(value, dict)
    kind = str(value.get("schema", "")).removeprefix("sglang-weight-")
    schema = schema_of(kind if kind == "state" else "layout")
    jsonschema = pytest.importorskip("jsonschema")
    if kind:
        jsonschema.validate(value, schema)
        return
    assert value
    published = place.server.slot.read().tensors
    for name, tensor in value.items():
        jsonschema.validate(tensor, {**schema["$defs"]["tensor"], "$defs": schema["$defs"]})
        addresses = {key: tensor[key] for key in ("ptr", "storage_ptr")}
        assert {**published[name], **addresses} == tensor


def schema_of(kind: str) -> dict[str, Any]:
    text = (PACKAGE / "layout" / "schema" / f"weight_{kind}.schema.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found


def everything_in(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from everything_in(each)


def parse_yaml(block: Block, place: Place) -> None:
    yaml = pytest.importorskip("yaml")
    documents = list(yaml.safe_load_all(block.text))
    assert all(isinstance(document, (dict, list)) for document in documents)
    if any("groups" in document for document in documents):
        check_rules(block.text, place)
    for mapping in everything_in(documents):
        for key in ("command", "args", "entrypoint"):
            words = mapping.get(key)
            if isinstance(words, str):
                words = words.split()
            if words and words[0] == "sglang-weight-hook":
                hold_options([str(word) for word in words])
        if str(mapping.get("name", "")).startswith("SGLANG_WEIGHT_HOOK"):
            assert mapping["name"] in {variable.name for variable in VARIABLES}


def check_rules(text: str, place: Place) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool (Debian package prometheus)")
    rules = place.folder / "rules.yml"
    rules.write_text(text)
    done = place.run(f"{promtool} check rules {rules}")
    assert done.returncode == 0, done.stdout + done.stderr


def parse_promql(block: Block, place: Place) -> None:
    expression = json.dumps(block.text)  # a JSON string is a YAML string
    rule = f"groups: [{{name: page, rules: [{{record: page, expr: {expression}}}]}}]\n"
    check_rules(rule, place)


def hold_dockerfile(block: Block, place: Place) -> None:
    instructions = code_blocks.commands_of(block.text)
    assert [command.text.split()[0] for command in instructions].count("FROM") >= 1
    for instruction in instructions:
        word, _, rest = instruction.text.partition(" ")
        assert word in ("FROM", "COPY", "RUN", "ENV", "WORKDIR", "ENTRYPOINT", "CMD", "USER", "ARG")
        if word == "COPY":  # the checkout, or files of it
            for source in rest.split()[:-1]:
                assert source in (".", "sglang-weight-hook") or (ROOT / source).exists(), source
        elif word == "RUN":
            bash_accepts(rest)
            for words in parts(rest):
                if words[0].endswith(("install_sglang_hook_patch.sh",)):
                    hold_options([f"./{Path(words[0]).name}", *words[1:]])
                elif "install" in words:
                    hold_extras(words)


def run_c(block: Block, place: Place) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    subprocess.run(
        [compiler, "-std=c11", "-fsyntax-only", "-x", "c", "-"],
        input=block.text,
        text=True,
        check=True,
    )


# Pictures


def hold_picture(block: Block, place: Place) -> None:
    """What a picture names is there; that it renders is checked elsewhere."""
    if block.text.startswith("stateDiagram"):
        named = set(re.findall(r"^\s*(\w+|\[\*\]) -->|--> (\w+|\[\*\])", block.text, re.MULTILINE))
        assert {state for pair in named for state in pair} - {"", "[*]"} == set(STATES)
        return
    held = 0
    folders: list[str] = []  # the subgraphs that we are in
    for line in block.text.splitlines():
        if match := re.match(r'\s*subgraph (\w+)(?:\["(.*)"\])?', line):
            folders.append(match[1])
            continue
        if line.strip() == "end":
            folders.pop()
        node = re.match(r'\s*\w+[\[({]+"?([^"\])}]+)', line)
        label = node[1] if node else ""
        for name in re.findall(r"[\w/]+(?:\.pyi?\b|\.pth\b|/(?![\w*{]))", label):
            output = name == "weights_metadata/"
            assert output or (ROOT / name).exists() or (PACKAGE / name).exists(), name
            held += 1
        if folders and (PACKAGE / folders[-1]).is_dir() and label:
            for module in label.partition("<br>")[0].split(", "):
                assert (PACKAGE / folders[-1] / f"{module}.py").is_file(), module
                held += 1
        elif re.fullmatch(r"[a-z]+", label):
            assert (PACKAGE / label).is_dir(), label
            held += 1
    assert held >= 3


# The control socket


def ask_the_server(block: Block, place: Place) -> None:
    """The request to the process itself, with the instance and an address of now."""
    shown, shown_answer = map(json.loads, block.text.splitlines())
    document = place.server.slot.read()
    region = document.regions[0]
    request = dict(shown)
    if "instance" in request:
        request["instance"] = document.instance
    if "ptr" in request:
        request.update(ptr=region["ptr"], size=region["size"])
    if "runs" in request:
        request["runs"] = [[region["ptr"], region["size"]]]
    state = place.server.slot.read_state()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(f"{os.path.relpath(place.server.slot.directory)}/{state['control']}")
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as file:
            answer = json.loads(file.readline())
            if answer["ok"] and "runs" in request:
                assert answer["bytes"] == len(file.read(region["size"])) == region["size"]
    if request["op"] == "share":  # hands out a GPU's memory, and this is a CPU
        page = (ROOT / block.page).read_text(encoding="utf-8")
        assert answer["ok"] is False
        assert f"`{answer['error']}`" in page
        return
    assert answer["ok"] is shown_answer["ok"] is True
    assert list(answer) == list(shown_answer)
    for name, value in shown_answer.items():
        assert type(answer[name]) is type(value), name


# Files as they are


def hold_file(block: Block, place: Place) -> None:
    """Lines of the files that an installation starts with, or their digests."""
    for line in block.text.splitlines():
        if match := re.fullmatch(r"([0-9a-f]{64})  (\S+)", line):
            assert hashlib.sha256((ROOT / match[2]).read_bytes()).hexdigest() == match[1]
        else:
            assert (ROOT / "sglang_injector.pth").read_text() == line + "\n"


# A shell


def bash_accepts(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), text


@cache
def help_of(*words: str) -> str:
    if words[0] == "sglang-weight-hook":
        words = (sys.executable, "-m", "sglang_weight_hook", *words[1:])
    elif words[0].startswith("./"):
        words = (str(ROOT / words[0]), *words[1:])
    done = subprocess.run(
        [*words, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def hold_options(words: list[str]) -> None:
    """The options of one of our commands, against its own --help."""
    words = [word.strip("[]") for word in words]
    if words[:3] == ["python", "-m", "sglang_weight_hook"]:
        words = ["sglang-weight-hook", *words[3:]]
    of_command = words[:1]
    if words[0] == "sglang-weight-hook" and len(words) > 1 and not words[1].startswith("-"):
        of_command = words[:2]
    elif words[1:2] == ["-m"]:
        of_command = [sys.executable, *words[1:3]]
        words = words[2:]
    text = help_of(*of_command)
    options = [word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)]
    for option in options:
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), option
    assert len(options) == len(set(options)), f"twice the same option: {options}"


def hold_options_of_ours(command: Command) -> None:
    for words in parts(command.text):
        if words[0] == "sglang-weight-hook":
            hold_options(words)


def run_and_compare(command: Command, place: Place) -> None:
    hold_options_of_ours(command)
    text = command.text
    document = place.server.slot.read()
    if match := re.search(r"lookup (0x[0-9a-f]+)", text):
        # The same byte of the same tensor, where this process has it.
        name = next(word for word in command.output.split() if word in document.tensors)
        offset = re.search(r"offset\s+(\d+)", command.output)
        assert offset, command.output
        here = document.tensors[name]["ptr"] + int(offset[1])
        text = text.replace(match[1], hex(here))
    done = place.run(text)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if command.output:
        # The regions are in the order of their addresses, which is another in each process.
        figures = not text.startswith(("./print_regions", "sglang-weight-hook regions"))
        said = done.stdout
        assert shows(command.output, said, figures=figures), difference(command.output, said)
    elif not text.startswith(("cc ", "cp ")):
        assert done.stdout


def follow_and_compare(command: Command, place: Place) -> None:
    """What prints a line for each change, beside a server that updates, until it has shown one."""
    shown = command.output.splitlines() or ["…"]
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command.text}"],
        cwd=place.folder,
        env={**place.environment, "PYTHONPATH": str(ROOT), "INTERVAL": "0.02"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    timer = threading.Timer(60, os.killpg, [process.pid, signal.SIGKILL])
    timer.start()
    try:
        said = process.stdout.readline()
        while said.count("\n") < len(shown):
            place.server.update()
            said += process.stdout.readline()
            while "updating" in said.splitlines()[-1]:
                said += process.stdout.readline()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=30)
    if command.output:
        assert shows(command.output, said, figures=False), difference(command.output, said)


def ask_an_agent(command: Command, place: Place) -> None:
    """An agent over the server's directory stands for those of the page, and for a registry's."""
    hold_options_of_ours(command)
    text = re.sub(r"\b(https|etcds?)://[\w.:,-]+", place.agent(), command.text)
    text = re.sub(r"\bnode\d:(?=0)", "", text)  # what a registry calls the slot
    done = place.run(text)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stdout + done.stderr
    assert not command.output or shows(command.output, done.stdout), done.stdout


def hold_make(command: Command, place: Place) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for words in parts(command.text):
        for target in words[1:]:
            name, equals, _ = target.partition("=")
            pattern = rf"^{name} \?= |^{name} := " if equals else rf"^{name}:.*## "
            assert re.search(pattern, makefile, re.MULTILINE), target


def hold_ours(command: Command, place: Place) -> None:
    for words in parts(command.text):
        if words[0].startswith("./"):
            assert (ROOT / words[0]).is_file()
        hold_options(words)


def hold_what_the_scripts_say(command: Command, place: Place) -> None:
    """Their options, and that each line shown is made of words that the installer has."""
    hold_ours(command, place)
    source = "".join(path.read_text() for path in (ROOT / "installer").glob("*.py"))
    source = re.sub(r'"\n\s+f?"', "", source)
    for line in command.output.splitlines():
        fixed = re.split(
            r"/\S+?(?=[ ;:]|$)|\bN\b|\d+(?:\.\d+)+|\s{2,}|Python |^\S+_patch\.sh: ", line
        )
        for words in filter(None, (piece.strip(" ,()") for piece in fixed)):
            assert words in source, words


def hold_launch(command: Command, place: Place) -> None:
    """SGLang's own options are those that the tests launch real servers with."""
    launched = (ROOT / "cpu_sglang" / "server.py").read_text()
    for words in parts(command.text):
        for option in (word for word in words if word.startswith("--") and word != "--"):
            assert re.search(rf'"{option}"', launched), option
    for variable in re.findall(r"\b(SGLANG_WEIGHT_HOOK\w*)=", command.text):
        assert variable in {each.name for each in VARIABLES}
    if "launch_wrapper.py" in command.text:
        usage = subprocess.run(
            [sys.executable, ROOT / "launch_wrapper.py", "--help"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        after = command.text.partition("launch_wrapper.py ")[2].split()[0]
        assert after in ("-m", "--") or after.startswith("--")
        assert after not in ("-m", "--") or f"launch_wrapper.py {after} " in usage


def hold_extras(words: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.findall(r"\[([a-z,]+)\]", " ".join(words))
    for extra in (each for group in extras for each in group.split(",")):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
    named = [word for word in words if re.match(r"sglang[-_]weight[-_]hook", word)]
    assert not named or 'name = "sglang-weight-hook"' in project


def hold_pip(command: Command, place: Place) -> None:
    for words in parts(command.text):
        assert words[0] in ("pip", "uv", "uvx", "pipx", "python"), words
        hold_extras(words)


def hold_module(command: Command, place: Place) -> None:
    (words,) = parts(command.text)
    hold_options(words)


def hold_pytest(command: Command, place: Place) -> None:
    (words,) = parts(command.text)
    for word in words:
        if word.startswith("tests/"):
            assert (ROOT / word).exists(), word
    for marker in re.findall(r"not (\w+)", command.text):
        assert f'"{marker}: ' in (ROOT / "pyproject.toml").read_text(), marker


def hold_metrics(command: Command, place: Place) -> None:
    source = (PACKAGE / "publisher" / "metrics.py").read_text()
    samples = [line for line in command.output.splitlines() if line != "…"]
    assert samples
    for sample in samples:
        match = re.fullmatch(r'sglang_weight_hook_(\w+)\{(\w+="[^"]*",?)*\} [\d.e+]+', sample)
        assert match, sample
        assert f'"{match[1]}"' in source, match[1]


def remove_by_hand(command: Command, environment: Mapping[str, str]) -> None:
    """In an environment of its own; afterwards Python starts without the hook."""
    asked = ["python", "-c", "import sys; print('sglang_patch_loader' in sys.modules)"]

    def hooked() -> str:
        path = shutil.which("python", path=environment["PATH"])
        assert path is not None
        return subprocess.run(
            [path, *asked[1:]], env=dict(environment), capture_output=True, text=True, check=True
        ).stdout.strip()

    assert hooked() == "True"
    done = subprocess.run(
        ["bash", "-c", command.text],
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert hooked() == "False"


class Rule(NamedTuple):
    pattern: str  # the beginning of a command
    treatment: Callable[..., None]
    why: str  # not simply run


READING = (
    *("show", "regions", "lookup", "report", "plot", "diff", "verify", "history"),
    *("checksum", "save", "compare"),
)
RULES = (
    Rule(
        r"sglang-weight-hook .* --via (mooncake|nixl)",
        hold_ours,
        "needs a transfer engine: tests/unit/test_transfer_page.py",
    ),
    Rule(
        r"sglang-weight-hook (slots|report|show|regions|history|verify) .*--dir (https|etcds?)://",
        ask_an_agent,
        "",
    ),
    Rule(rf"sglang-weight-hook ({'|'.join(READING)})\b", run_and_compare, ""),
    Rule(r"(jq|cat|sha256sum|cp|cc) ", run_and_compare, ""),
    Rule(r"\./print_regions (?!--header)", run_and_compare, ""),
    Rule(r"make help$", run_and_compare, ""),
    Rule(
        r"\./print_regions --header|examples/watch\.sh |python examples/register_regions\.py ",
        follow_and_compare,
        "they go on until they are stopped",
    ),
    Rule(
        r"(sglang-weight-hook|python -m sglang_weight_hook) ", hold_ours, "goes on, or needs SGLang"
    ),
    Rule(r"make ", hold_make, "takes minutes, or starts servers"),
    Rule(
        r"\./(un)?install_sglang_hook_patch\.sh ",
        hold_what_the_scripts_say,
        "tests/install runs them in fresh environments of every Python",
    ),
    Rule(
        r"(install -d [^&]+&& )?(SGLANG\w+=\S+ )*\S*python (-m sglang(\.|…)|launch_wrapper\.py )",
        hold_launch,
        "launches a server: tests/real_sglang",
    ),
    Rule(
        r"(pip|uv|uvx|pipx|python -m pip) ", hold_pip, "needs a network: tests/install/test_pip.py"
    ),
    Rule(r"\.cache/tools/bin/python -m tests\.", hold_module, "needs a compiler's sanitizers"),
    Rule(r"python3\.\d+ -m pytest ", hold_pytest, "needs that Python of the system, and root"),
    Rule(r"curl -s localhost:30000/metrics \|", hold_metrics, "needs a server with metrics"),
    Rule(r'rm "\$\(python -c ', remove_by_hand, "removes the hook from an environment"),
)


def rule_of(command: Command) -> Rule:
    found = next((rule for rule in RULES if re.match(rule.pattern, command.text)), None)
    assert found is not None, f"no treatment for the command: {command.text}"
    return found


def is_script(block: Block) -> bool:
    return "<<" in block.text


def run_script(block: Block, place: Place, environment: Mapping[str, str]) -> None:
    """An audit, in an environment in which the hook is installed: nothing is found to be wrong."""
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", allowing_doctor(block.text)],
        env=dict(environment),
        cwd=place.folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BAD" not in done.stdout
    for name in ("sglang_injector.pth", "sglang_injector.start"):
        digest = hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
        assert f"{digest}  {name}" in done.stdout
    if "RECORD" in block.text:
        assert "ok  sglang_patch_loader.py" in done.stdout


def allowing_doctor(text: str) -> str:
    """SGLang is not in that environment, which ``doctor`` has to say and exit with 3."""
    return re.sub(r"^(python -m sglang_weight_hook doctor)", r"\1 || test $? = 3", text, flags=re.M)


def run_shell(block: Block, place: Place, environment: Callable[[], Mapping[str, str]]) -> None:
    if is_script(block):
        bash_accepts(block.text)
        run_script(block, place, environment())
        return
    commands = code_blocks.commands_of(block.text)
    assert commands
    for command in commands:
        bash_accepts(command.text)
        rule = rule_of(command)
        if block.page == "README.md" and command.output:
            # It shows how an output begins; the tutorial shows all of it.
            command = command._replace(output=command.output + "…\n")
        if block.page == "docs/tutorial.md" and not rule.why:
            # Run in order beside a real server, in tests/real_sglang/test_tutorial.py.
            hold_options_of_ours(command)
        elif rule.treatment is remove_by_hand:
            remove_by_hand(command, environment())
        else:
            rule.treatment(command, place)


TREATMENTS: Mapping[str, Callable[[Block, Place], None]] = {
    "pycon": run_doctest,
    "json": parse_json,
    "yaml": parse_yaml,
    "promql": parse_promql,
    "dockerfile": hold_dockerfile,
    "c": run_c,
    "mermaid": hold_picture,
}
SHELLS = ("", "sh", "bash", "console", "shell", "text")


def treatment_of(block: Block) -> Callable[[Block, Place], None] | None:
    """None for a shell's, which may need an environment of its own."""
    if block.language == "python":
        runs = re.match(r"import |from |with open", block.text) or block.page != "docs/api.md"
        return run_python if runs else hold_signature
    if block.language in TREATMENTS:
        return TREATMENTS[block.language]
    assert block.language in SHELLS, f"{block}: no treatment for the language {block.language}"
    if block.text.startswith('{"op": '):
        return ask_the_server
    if re.match(r"[0-9a-f]{64}  \S+$|import sglang_patch_loader;", block.text, re.MULTILINE):
        return hold_file
    return None


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_does_what_it_says(
    block: Block, place: Place, request: pytest.FixtureRequest
) -> None:
    treatment = treatment_of(block)
    if treatment is None:
        run_shell(block, place, lambda: request.getfixturevalue("installed"))
    else:
        treatment(block, place)


def test_blocks_are_found_on_every_page_that_has_some() -> None:
    for page in code_blocks.pages():
        fences = re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)
        found = [block for block in BLOCKS if block.page == str(page.relative_to(ROOT))]
        assert len(found) * 2 == len(fences)
    assert len(BLOCKS) > 100


def test_a_block_of_a_kind_that_nobody_knows_is_refused() -> None:
    with pytest.raises(AssertionError, match="no treatment for the language rust"):
        treatment_of(Block("README.md", 1, "rust", "fn main() {}\n"))
    with pytest.raises(AssertionError, match="no treatment for the command: frobnicate"):
        rule_of(Command("frobnicate --all", ""))


def test_an_option_that_does_not_exist_is_refused() -> None:
    hold_options(["sglang-weight-hook", "show", "--top", "5"])
    with pytest.raises(AssertionError, match="--bottom"):
        hold_options(["sglang-weight-hook", "show", "--bottom", "5"])
    with pytest.raises(AssertionError, match="twice"):
        hold_options(["./uninstall_sglang_hook_patch.sh", "[--force]", "[--force]"])


def test_the_collector_does_what_its_examples_say() -> None:
    assert doctest.testmod(code_blocks).failed == 0
