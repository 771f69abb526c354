"""Make ``docs/api.md`` from the signatures, docstrings and comments of the public names.

    python -m tools.api            write it, where it is out of date
    python -m tools.api --check    only say so, and exit 1

Public is what ``__all__`` of the package and of its reader names.  Nothing is imported: the
sources are parsed, so the page is the same whichever Python makes it.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeGuard, Union

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("sglang_weight_hook")
ROOMS = (PACKAGE / "__init__.py", PACKAGE / "reader" / "__init__.py")
PAGE = Path("docs/api.md")

# In the order in which one needs them.  A public name that is not here comes in the last chapter,
# an exception in that of the errors.
ERRORS, MORE = "Errors", "More"
CHAPTERS: Mapping[str, tuple[str, ...]] = {
    "Opening": ("open_directory", "open_slot", "open_file"),
    "A directory and its slots": ("Directory", "Change", "Slot"),
    "Whether it is still true": ("Check", "HeaderReader", "Header"),
    "One publication": ("Document", "Tensor", "Region", "CacheBuffer", "Hit"),
    "What changed": ("compare", "Diff", "History", "PastEvent"),
    ERRORS: ("HookError",),
    MORE: (),
}

HEAD = """\
# The reading API

<!-- Made by `python -m tools.api` from the docstrings; what is changed here is lost. -->

```python
import sglang_weight_hook
```

reads what a server publishes, on Python 3.9 and later, with the standard library alone: neither
torch nor SGLang need be installed. What the fields mean is in [format.md](format.md), how the
pieces work together in [architecture.md](architecture.md).

**Addresses and sizes are in bytes, times in seconds; shapes, strides and indices count elements.**
Addresses are those of the publishing process. Every error is a [HookError](#hookerror) whose
message says what to do.
"""

Function = Union[ast.FunctionDef, ast.AsyncFunctionDef]
Definition = Union[Function, ast.ClassDef, ast.Assign, ast.AnnAssign]


class NotFound(Exception):
    """A name that is public, or has a place in a chapter, and is defined nowhere."""


class Name(NamedTuple):
    """A public name, and where it is defined."""

    name: str
    home: str  # where to import it from
    node: Definition
    comments: Mapping[int, str]  # of that file, by line; see `comments_in`


# --- from the sources -----------------------------------------------------------------------


def public_names(root: Path) -> dict[str, Name]:
    found: dict[str, Name] = {}
    for path in ROOMS:
        for name in _all_of(_tree(root / path)):
            if name not in found and not name.startswith("__"):
                home = ".".join(path.parent.parts)
                found[name] = Name(name, home, *find(root, path, name))
    return found


def find(root: Path, path: Path, name: str) -> tuple[Definition, Mapping[int, str]]:
    """The definition of ``name``, by way of the files that pass it on, and that file's comments.

    Raises NotFound.
    """
    text = (root / path).read_text("utf-8")
    passed_on = None
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            # Also where only a type checker imports it: the package itself does so on demand.
            aliases = [alias.asname or alias.name for alias in node.names]
            if node.level and node.module and name in aliases:
                base = path.parents[node.level - 1]
                passed_on = base / node.module.replace(".", "/")
        elif _defines(node, name):
            return node, comments_in(text)
    if passed_on is None:
        raise NotFound(f"{name} is public, and {path} neither defines it nor takes it from a file")
    package = passed_on / "__init__.py"
    return find(root, package if (root / package).exists() else passed_on.with_suffix(".py"), name)


def _defines(node: ast.AST, name: str) -> TypeGuard[Definition]:
    if getattr(node, "col_offset", -1) != 0:  # inside of something
        return False
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return node.name == name
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.target) == name
    return isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets)


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def _all_of(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def comments_in(text: str) -> dict[int, str]:
    """What is said of the code of a line: at its end, else in the lines above.

    >>> comments_in("x = 1  # one\\n# a\\n# pair\\ny = 2\\n")
    {1: 'one', 4: 'a pair'}
    """
    own: dict[int, str] = {}  # lines with nothing but a comment
    found: dict[int, str] = {}
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            alone = not lines[row - 1][:column].strip()
            (own if alone else found)[row] = token.string.lstrip("# ")
    for row in range(1, len(lines) + 1):
        if row in own or row in found or row - 1 not in own:
            continue
        first = row - 1
        while first - 1 in own:
            first -= 1
        found[row] = " ".join(own[number] for number in range(first, row))
    return found


# --- to Markdown ----------------------------------------------------------------------------


def page(root: Path = ROOT) -> str:
    """The whole of ``docs/api.md``.  Raises NotFound."""
    names = public_names(root)
    missing = sorted({name for chapter in CHAPTERS.values() for name in chapter} - names.keys())
    if missing:
        raise NotFound(f"no public name {', '.join(missing)}: change CHAPTERS in tools/api.py")
    parts = [HEAD]
    for chapter, members in chapters(names).items():
        if members:
            parts.append(f"## {chapter}\n")
            parts += [part for name in members for part in _entry(names[name], names)]
    return "\n".join(parts).rstrip() + "\n"


def chapters(names: Mapping[str, Name]) -> dict[str, list[str]]:
    placed = {name for chapter in CHAPTERS.values() for name in chapter}
    result = {chapter: list(members) for chapter, members in CHAPTERS.items()}
    for name, found in names.items():
        if name not in placed:
            result[ERRORS if _is_error(found, names) else MORE].append(name)
    return result


def _is_error(found: Name, names: Mapping[str, Name]) -> bool:
    if not isinstance(found.node, ast.ClassDef):
        return False
    for base in map(ast.unparse, found.node.bases):
        if base.endswith(("Exception", "Error")) or (
            base in names and _is_error(names[base], names)
        ):
            return True
    return False


def _entry(found: Name, names: Mapping[str, Name]) -> Iterator[str]:
    node = found.node
    yield f"### {found.name}\n"
    if found.home != PACKAGE.name:
        yield f"From `{found.home}`.\n"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        yield _code(f"class {node.name}({bases})" if bases else f"class {node.name}")
        yield from _text_of(node, names)
        yield from _attributes(found, names)
        for member in node.body:
            if _is_public_method(member):
                yield f"#### {node.name}.{member.name}\n"
                yield _code(_signature(member, node.name))
                yield from _text_of(member, names)
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        yield _code(_signature(node))
        yield from _text_of(node, names)
    else:
        yield _code(ast.unparse(node))
        comment = found.comments.get(node.lineno)
        if comment:
            yield markdown(comment, names) + "\n"


def _is_public_method(node: ast.AST) -> TypeGuard[Function]:
    is_method = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    return is_method and not getattr(node, "name", "_").startswith("_")


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n"


def _text_of(node: Union[Function, ast.ClassDef], names: Mapping[str, Name]) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text:
        yield markdown(text, names) + "\n"


def _signature(node: Function, owner: str = "") -> str:
    """As it is called: ``slot.read(timeout: float = 10.0) -> Document``."""
    decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    result = ast.unparse(node.returns) if node.returns else ""
    if decorators & {"property", "cached_property"}:
        return f"{owner.lower()}.{node.name} -> {result}"
    arguments = list(_arguments(node.args))
    prefix = ""
    if owner:
        prefix = f"{owner if 'classmethod' in decorators else owner.lower()}."
        if "staticmethod" not in decorators:
            del arguments[0]
    if "contextmanager" in decorators:
        prefix = f"with {prefix}"
        result = re.sub(r"^Iterator\[(.*)\]$", r"\1", result)
        result = "" if result == "None" else result
    end = f" -> {result}" if result else ""
    line = f"{prefix}{node.name}({', '.join(arguments)}){end}"
    if len(line) <= 100:
        return line
    inside = "".join(f"    {argument},\n" for argument in arguments)
    return f"{prefix}{node.name}(\n{inside}){end}"


def _arguments(arguments: ast.arguments) -> Iterator[str]:
    """Each parameter as it is written, with the marks ``/`` and ``*`` among them."""
    positional = arguments.posonlyargs + arguments.args
    without = len(positional) - len(arguments.defaults)
    for position, argument in enumerate(positional):
        default = arguments.defaults[position - without] if position >= without else None
        yield _argument(argument, default)
        if position + 1 == len(arguments.posonlyargs):
            yield "/"
    if arguments.vararg:
        yield "*" + _argument(arguments.vararg, None)
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults):
        yield _argument(argument, default)
    if arguments.kwarg:
        yield "**" + _argument(arguments.kwarg, None)


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return ast.unparse(argument)
    sign = " = " if argument.annotation else "="
    return f"{ast.unparse(argument)}{sign}{ast.unparse(default)}"


def _attributes(found: Name, names: Mapping[str, Name]) -> Iterator[str]:
    """What an instance holds: a NamedTuple's fields, or what ``__init__`` puts in."""
    rows = []
    assert isinstance(found.node, ast.ClassDef)
    for member in found.node.body:
        if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
            kind = ast.unparse(member.annotation)
            rows.append((member.target.id, kind, found.comments.get(member.lineno, "")))
        elif isinstance(member, ast.FunctionDef) and member.name == "__init__":
            rows += _set_in(member, found.comments)
    rows = [row for row in rows if not row[0].startswith("_")]
    if not rows:
        return
    lines = ["| attribute | type | meaning |", "|---|---|---|"]
    for name, kind, comment in rows:
        meaning = markdown(comment, names).replace("|", "\\|")
        lines.append(f"| `{name}` | `{kind}` | {meaning} |".replace("|  |", "| |"))
    yield "\n".join(lines) + "\n"


def _set_in(node: ast.FunctionDef, comments: Mapping[int, str]) -> Iterator[tuple[str, str, str]]:
    kinds = {
        argument.arg: ast.unparse(argument.annotation)
        for argument in node.args.args
        if argument.annotation
    }
    for line in node.body:
        if isinstance(line, ast.AnnAssign):
            target, kind = ast.unparse(line.target), ast.unparse(line.annotation)
        elif isinstance(line, ast.Assign):
            target = ast.unparse(line.targets[0])
            value = [part.id for part in ast.walk(line.value) if isinstance(part, ast.Name)]
            kind = next((kinds[name] for name in value if name in kinds), "")
        else:
            continue
        if target.startswith("self."):
            yield target[5:], kind, comments.get(line.lineno, "")


def markdown(text: str, names: Mapping[str, Name]) -> str:
    """A docstring as Markdown: names become links, doctests code.

    >>> markdown("Like ``a | b``.", {})
    'Like `a | b`.'
    """
    blocks = []
    for block in inspect.cleandoc(text).split("\n\n"):
        if block.lstrip().startswith(">>>"):
            blocks.append(f"```pycon\n{inspect.cleandoc(block)}\n```")
        else:
            # What is in two backquotes stays; in one it is a name of ours, if of anybody's.
            pieces = re.split(r"``(.+?)``", block, flags=re.DOTALL)
            pieces[0::2] = [_linked(piece, names) for piece in pieces[0::2]]
            pieces[1::2] = [f"`{piece}`" for piece in pieces[1::2]]
            blocks.append("".join(pieces))
    return "\n\n".join(blocks)


def _linked(text: str, names: Mapping[str, Name]) -> str:
    def link(match: re.Match[str]) -> str:
        name = match.group(1)
        if name.partition(".")[0] not in names:
            return match.group(0)
        return f"[`{name}`](#{name.replace('.', '').lower()})"

    return re.sub(r"`([A-Za-z_][\w.]*)`", link, text)


# --- the command ----------------------------------------------------------------------------


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.api", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--check", action="store_true", help="only say whether the page is out of date; exit 1"
    )
    check = parser.parse_args(arguments).check
    try:
        text = page(root)
    except NotFound as error:
        print(f"tools.api: {error}", file=sys.stderr)
        return 1
    path = root / PAGE
    if path.exists() and path.read_text("utf-8") == text:
        return 0
    if check:
        print(f"{PAGE} is out of date: run python -m tools.api", file=sys.stderr)
        return 1
    path.write_text(text, "utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
