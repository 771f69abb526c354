"""What the functions of a release do, as far as weights are concerned, found in its syntax trees.

General rules, of which some use words of SGLang's own names (``memory_occupation``); a rule is a
few lines in `_evidence_of`.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Optional, TypeGuard, Union

from .sources import CACHE, Release

# What speaks for a function writing weights, or for its being worth a look.
LOADS = "calls what loads or post-processes weights"
BUILDS = "builds a model"
ASSIGNS = "writes into a parameter or a tensor's .data"
TRANSFERS = "receives into memory by address"
FREES = "takes memory away, or gives it back"
NAMED = "is named like a method that changes weights"

# Folders and files that are looked at: what runs in a process that has a model.
SCOPE = re.compile(
    r"sglang/(srt|multimodal_gen/runtime)/(?!"
    # Layers and models are what the functions looked at call.  The library of loaders is read.
    r"models/|layers/(?!moe/(dwdp|paged_experts))|hardware_backend/\w+/(quantization|kernels|attention)/"
    # No model in these processes, or nothing but arithmetic, text and arguments.
    r"|entrypoints/|function_call/|parser/|configs/|arg_groups/|tokenizer/|constrained/|sampling/"
    r"|multimodal/|kv_canary/|compilation/|connector/|observability/|debug_utils/|platforms/"
    r"|managers/(multi_)?(de)?tokenizer\w*\.py|managers/data_parallel_controller\.py"
    r"|distributed/device_communicators|server_args|realtime/|rust_|kernel_plugins/|batch_invariant_ops/)"
)
# Read too, for what the hook reads of them.
ALSO = (
    "sglang/srt/server_args.py",
    "sglang/srt/configs/model_config.py",
    "sglang/srt/distributed/parallel_state_wrapper.py",
    "sglang/srt/arg_groups/fields/",
    "sglang/multimodal_gen/runtime/platforms/__init__.py",
)
# Called by what is looked at: a call of one of its functions that write counts as a write.
LIBRARY = (
    "sglang.srt.model_loader.",
    "sglang.srt.lora.",
    "sglang.srt.layers.",
    "sglang.srt.utils.torch_memory_saver_adapter.",
    "sglang.multimodal_gen.runtime.loader.",
    "sglang.multimodal_gen.runtime.pipelines.",
)

# A file without one of these words is not parsed: it can neither write weights nor call what does
# by a name that says so.
_WORTH_PARSING = re.compile(
    rb"weight|lora|load_model|memory_saver|memory_occupation|state_dict|named_parameters"
    rb"|expert_location|ModelRunner|Worker|[kv]v?_buffer\\b"
)

_LOADING = re.compile(
    r"_?(model_)?load_weights(_\w+)?|\w+_load_weights|load_state_dict|\w*weight_loader"
    r"|(post_load|postprocess|post_process|process|restore|reload|refresh|requantize)_weights(_\w+)?"
    r"|set_embed(_and_head)?|set_lora_weights|merge_lora_weights|unmerge_lora_weights"
)
_BUILDING = re.compile(
    r"get_model|load_model(_\w+)?|initialize_model|_initialize_model|build_model"
)
_IN_PLACE = re.compile(r"(copy|fill|zero|set|uniform|normal|random|mul|add|swap)_")
_WEIGHTY = re.compile(r"(?i)(^|_)(params?|parameters?|weights?|experts?)(_|$)")
_SOURCE_SIDE = re.compile(
    r"(?i)(^|_)(temp|tmp|host|cpu|pinned|recv|send|staging|out|output|ids?)(_|$)"
)
_TRANSFERRING = re.compile(r"(batch_)?transfer_(sync_|submit_)?(read|write)|batch_transfer\w*_read")
_FREEING = re.compile(r"pause|resume")
_SAVER = re.compile(r"(?i)memory_saver|saver_adapter")
_NAME = re.compile(
    r"_*(update|load|unload|reload|reset|begin|end|finalize|swap|sync|receive|relocate|restore"
    r"|recover|apply|merge|unmerge|set|refit|offload|onload|release|resume|sleep|wake_up)_"
    r"(\w+_)?(weights?|parameters?|lora|loras|memory_occupation|expert_location|expert_weights"
    r"|adapter|checkpoint)(?!_(version|group|info|metadata|path|config|stats|ids|cache|mode))(_\w+)?"
)

# Of the rules as they are when this is imported.
_THIS_FILE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]

_REQUEST = re.compile(r"Req(Input)?$")

FunctionNode = Union[ast.FunctionDef, ast.AsyncFunctionDef]


class Use(NamedTuple):
    """A function's name where it is called, or handed on to be called by somebody else."""

    receiver: str  # "" for a bare name, "self", "super", else the last name before the dot
    name: str
    called: bool
    # Class of the receiver, where the function has just made one of it; "self" for an attribute
    # of the function's own object, which its class may have made.
    typed_by: str = ""


class Evidence(NamedTuple):
    kind: str
    line: int
    text: str
    # The call that it is: none where the function itself is called.  Where a call is known to be of
    # another function that is looked at, it is that one that has to be judged.
    call: Optional[Use] = None


class Handler(NamedTuple):
    """An entry in a table of request types and the methods that answer them."""

    request: str
    method: Use


class Function(NamedTuple):
    module: str
    owner: str  # class, or empty
    name: str
    line: int
    signature: str
    uses: tuple[Use, ...]
    evidence: tuple[Evidence, ...]
    handlers: tuple[Handler, ...]
    is_property: bool

    @property
    def place(self) -> tuple[str, str, str]:
        return self.module, self.owner, self.name

    @property
    def title(self) -> str:
        return ".".join(part for part in (self.owner, self.name) if part)


class Class(NamedTuple):
    module: str
    name: str
    bases: tuple[str, ...]
    attributes: frozenset[str]  # methods, class attributes, and what is assigned to self
    made: dict[str, str]  # attribute -> class that it is made of, where it is made in its place


class Module(NamedTuple):
    name: str
    functions: tuple[Function, ...]
    classes: tuple[Class, ...]
    # Name in the module -> module and name that it comes from; also inside functions.
    imports: dict[str, tuple[str, str]]
    variables: frozenset[str]


class Summary(NamedTuple):
    version: str
    modules: dict[str, Module]
    # Every module of the release, parsed or not, and every package.
    names: frozenset[str]
    unreadable: tuple[str, ...]  # files that are no Python for this interpreter


def summary_of(release: Release) -> Summary:
    """All that is known of a release; of a wheel it is kept, as long as this file is the same."""
    if release.origin.is_dir():
        return _summary_of(release)
    size = release.origin.stat().st_size
    kept = CACHE / "summaries" / f"{release.origin.stem}-{size}-{_THIS_FILE}"
    try:
        found = pickle.loads(kept.read_bytes())
        if isinstance(found, Summary):
            return found
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError):
        pass
    found = _summary_of(release)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(pickle.dumps(found))
    return found


def _summary_of(release: Release) -> Summary:
    modules: dict[str, Module] = {}
    names: set[str] = set()
    unreadable: list[str] = []
    # Millions of nodes and no cycles: collecting garbage meanwhile takes longer than parsing.
    collecting = gc.isenabled()
    gc.disable()
    try:
        for path, text in release.files():
            name = _module_name(path)
            parts = name.split(".")
            names.update(".".join(parts[:count]) for count in range(1, len(parts) + 1))
            if path.startswith(ALSO) or (SCOPE.match(path) and _WORTH_PARSING.search(text)):
                try:
                    is_package = path.endswith("/__init__.py")
                    modules[name] = module_of(name, text.decode("utf-8"), is_package)
                except (SyntaxError, ValueError, RecursionError):
                    unreadable.append(path)
    finally:
        if collecting:
            gc.enable()
    return Summary(release.version, modules, frozenset(names), tuple(unreadable))


def _module_name(path: str) -> str:
    name = path[: -len(".py")].replace("/", ".")
    return name[: -len(".__init__")] if name.endswith(".__init__") else name


def module_of(name: str, text: str, is_package: bool = False) -> Module:
    """What a module's text says.  Raises SyntaxError."""
    tree = ast.parse(text)
    functions: list[Function] = []
    classes: list[Class] = []
    for node in _definitions(tree.body):
        if isinstance(node, ast.ClassDef):
            stored: dict[str, str] = dict.fromkeys(_class_attributes(node), "")
            for method in _definitions(node.body):
                if not isinstance(method, ast.ClassDef):
                    functions.append(_function(name, node.name, method, stored))
            made = {attribute: kind for attribute, kind in stored.items() if kind}
            bases = tuple(_bases(node))
            classes.append(Class(name, node.name, bases, frozenset(stored), made))
        else:
            functions.append(_function(name, "", node, {}))
    variables = frozenset(_variables(tree.body))
    imports = _imports(tree, name, is_package)
    return Module(name, tuple(functions), tuple(classes), imports, variables)


def _definitions(body: Iterable[ast.stmt]) -> Iterator[Union[FunctionNode, ast.ClassDef]]:
    """Functions and classes, also those inside ``if``, ``try`` and ``with``."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from _definitions(node.body)
            yield from _definitions(getattr(node, "orelse", []))
            yield from _definitions(getattr(node, "finalbody", []))
            for handler in getattr(node, "handlers", []):
                yield from _definitions(handler.body)


def _bases(node: ast.ClassDef) -> Iterator[str]:
    for base in node.bases:
        base = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(base, (ast.Name, ast.Attribute)):
            yield _last_name(base)


def _variables(body: Iterable[ast.stmt]) -> Iterator[str]:
    for child in body:
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            yield child.target.id
        elif isinstance(child, ast.Assign):
            yield from (target.id for target in child.targets if isinstance(target, ast.Name))


def _class_attributes(node: ast.ClassDef) -> Iterator[str]:
    yield from _variables(node.body)
    yield from (each.name for each in _definitions(node.body) if not isinstance(each, ast.ClassDef))


def _imports(tree: ast.Module, module: str, is_package: bool) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            above = parts[: len(parts) - node.level + is_package] if node.level else []
            origin = ".".join(above + ([node.module] if node.module else []))
            for alias in node.names:
                found[alias.asname or alias.name] = (origin, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                start, _, last = alias.name.rpartition(".")
                found[alias.asname or last] = (start, last)
        else:
            # Statements only: no expression imports anything.
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                inner = getattr(node, field, None)
                pending += inner if isinstance(inner, list) else []
    return found


# --- one function -------------------------------------------------------------------------------


def _function(module: str, owner: str, node: FunctionNode, stored: dict[str, str]) -> Function:
    """Adds to ``stored`` the attributes of ``self`` that it assigns, and what they are made of."""
    inside = _nodes(node)
    made = _made_in(inside, stored)
    uses: dict[Use, None] = {}
    handlers: dict[Handler, None] = {}
    evidence: dict[tuple[str, Optional[Use]], Evidence] = {}
    called: set[int] = set()
    # Functions defined inside count as part of it: they run when it says so.
    for inner in inside:
        if isinstance(inner, ast.Call):
            called.add(id(inner.func))
        if isinstance(inner, (ast.Attribute, ast.Subscript)) and id(inner) not in called:
            called.add(id(inner.value))  # the receiver of something, not a function handed on
        if isinstance(inner, (ast.Name, ast.Attribute)) and isinstance(inner.ctx, ast.Load):
            use = _use(inner, id(inner) in called, made)
            is_inside = id(inner) in called and not use.called
            if not is_inside:
                uses[use] = None
        if isinstance(inner, ast.Tuple) and len(inner.elts) == 2:
            kind, handler = inner.elts
            request = kind.id if isinstance(kind, ast.Name) else ""
            if isinstance(handler, ast.Attribute) and _REQUEST.search(request):
                handlers[Handler(request, _use(handler, False, made))] = None
        for found in _evidence_of(inner, made):
            evidence.setdefault((found.kind, found.call), found)
    if _NAME.fullmatch(node.name):
        evidence[(NAMED, None)] = Evidence(NAMED, node.lineno, node.name)
    return Function(
        module,
        owner,
        node.name,
        node.lineno,
        signature_of(node),
        tuple(uses),
        tuple(evidence.values()),
        tuple(handlers),
        any(_last_name(mark).endswith("property") for mark in node.decorator_list),
    )


def _nodes(node: ast.AST) -> list[ast.AST]:
    """It and all that is inside, parents first, but for what only names a type."""
    found = [node]
    for each in found:
        if isinstance(each, ast.Call) and _last_name(each.func) in ("isinstance", "cast"):
            found += [each.func, *each.args[:1]]
            continue
        for field in each._fields:
            value = getattr(each, field, None) if field not in ("annotation", "returns") else None
            if isinstance(value, list):
                found += [item for item in value if isinstance(item, ast.AST)]
            elif isinstance(value, (ast.expr, ast.stmt, ast.arguments)):
                found.append(value)
    return found


def _made_in(nodes: Iterable[ast.AST], stored: dict[str, str]) -> dict[str, str]:
    """Local variable -> class that it is made of; attributes of ``self`` go to ``stored``."""
    made: dict[str, str] = {}
    for inner in nodes:
        if isinstance(inner, ast.Assign):
            for target in inner.targets:
                kind = _last_name(inner.value.func) if isinstance(inner.value, ast.Call) else ""
                kind = kind if kind.strip("_")[:1].isupper() else ""
                if isinstance(target, ast.Name) and kind:
                    made[target.id] = kind
                for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if _is_own(each):
                        stored[each.attr] = stored.get(each.attr) or kind
        elif isinstance(inner, (ast.AnnAssign, ast.AugAssign)) and _is_own(inner.target):
            stored.setdefault(inner.target.attr, "")
    return made


def _is_own(node: ast.AST) -> TypeGuard[ast.Attribute]:
    """Whether it is ``self.something``."""
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def _use(
    node: Union[ast.Name, ast.Attribute],
    called: bool,
    made: Mapping[str, str] = MappingProxyType({}),
) -> Use:
    if isinstance(node, ast.Name):
        return Use("", node.id, called)
    kind = "self" if _is_own(node.value) else ""
    if isinstance(node.value, ast.Name):
        kind = made.get(node.value.id, "")
    return Use(_last_name(node.value), node.attr, called, kind)


def _last_name(node: ast.AST) -> str:
    """``c`` of ``a.b.c``, of ``a.b.c[0]`` and of ``a.b.c()``; empty for what has no name."""
    while isinstance(node, (ast.Call, ast.Subscript, ast.Await)):
        node = node.func if isinstance(node, ast.Call) else node.value
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else ""


def signature_of(node: FunctionNode) -> str:
    """The parameters without annotations: what a call has to fit."""
    every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    kept = [(each, each.annotation) for each in (*every, node.args.vararg, node.args.kwarg) if each]
    for each, _ in kept:
        each.annotation = None
    try:
        return f"({ast.unparse(node.args)})"
    finally:
        for each, annotation in kept:
            each.annotation = annotation


# --- the rules ----------------------------------------------------------------------------------


def _evidence_of(node: ast.AST, made: Mapping[str, str]) -> Iterator[Evidence]:
    if isinstance(node, ast.Call):
        name = _last_name(node.func)
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        if _LOADING.fullmatch(name):
            yield _seen(LOADS, node, made)
        # get_model() without arguments is an accessor, load_model() is a runner's.
        if _BUILDING.fullmatch(name) and (node.args or node.keywords):
            yield _seen(BUILDS, node, made)
        if _TRANSFERRING.fullmatch(name):
            yield _seen(TRANSFERS, node, made)
        if _FREEING.fullmatch(name) and owner and _SAVER.search(_last_name(owner)):
            yield _seen(FREES, node, made)
        if owner and _IN_PLACE.fullmatch(name) and _is_weight(owner):
            yield _seen(ASSIGNS, node, made)
    elif isinstance(node, (ast.Assign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            inner = target.value if isinstance(target, ast.Subscript) else target
            is_data = isinstance(inner, ast.Attribute) and inner.attr == "data"
            if is_data and _is_weight(inner):
                yield _seen(ASSIGNS, node, made)


def _is_weight(node: ast.AST) -> bool:
    """Whether an expression that is written to is a parameter, going by the names in it."""
    names = [
        inner.id if isinstance(inner, ast.Name) else inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, (ast.Name, ast.Attribute))
    ]
    if any(_SOURCE_SIDE.search(name) for name in names):
        return False
    return any(_WEIGHTY.search(name) for name in names) or (
        "data" in names
        and any(re.search(r"(?i)tensor|module|layer|^p$|^w$", name) for name in names)
    )


def _seen(kind: str, node: Union[ast.expr, ast.stmt], made: Mapping[str, str]) -> Evidence:
    text = " ".join(ast.unparse(node).split())
    text = text if len(text) <= 90 else text[:87] + "..."
    named = node.func if isinstance(node, ast.Call) and kind in (LOADS, BUILDS) else None
    call = _use(named, True, made) if isinstance(named, (ast.Name, ast.Attribute)) else None
    return Evidence(kind, node.lineno, text, call)
