"""The structure that keeps train_gpt.py readable, checked on its syntax tree alone.

Every check takes source text and returns complaints, so that each is first shown a bad source it
must complain about, and one good source that all of them must accept.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_COLUMNS = 100
MAX_FUNCTION_LINES, MAX_TRAIN_LINES = 60, 80
MAX_BLOCK_FORWARD_LINES, MAX_FORWARD_LINES, MAX_FORWARD_IFS = 15, 35, 2
MAX_LINES_WITHOUT_DOCSTRING = 8

RULE = "# " + "=" * 97
OTHER_RULE = re.compile(r"#\s*([-=#*_~])\1{4,}")
MAP_LINE = re.compile(r" {1,3}(\d+)  (\S.*?)  +\S")
SHAPE = re.compile(r"\((?:\.\.\.|[A-Z]\w*)(?:, ?[\w.*/+ -]+)+\)")
FORBIDDEN_IN_COMMENTS = re.compile(r"\bPR ?#|\bpull request\b|\b(TODO|FIXME|XXX)\b", re.I)

SETTINGS_CLASS = "Config"
SETTINGS_OBJECTS = {"cfg", "config"}
# These read fields to print or to refuse them, which is no use of a setting.
NOT_A_USE = {"__post_init__", "checks", "from_env", "listing"}
# Tables whose strings name fields that are then looked up by name.
FIELD_NAME_TABLES = {"ROUTES"}
ENVIRONMENT_READERS = {"from_env", "main", "start"}
PRINTERS = {"log", "main"}
SYSTEM_NAMES = re.compile(
    r"(OMP|NCCL|CUDA|TORCH|TORCHINDUCTOR|PYTORCH|PIP|HF|GLIBC|MATCHED)_\w+|PYTHON|PRESET|CDPATH"
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def parse(source: str) -> ast.Module:
    """The syntax tree of a source text."""
    return ast.parse(source)


def functions_in(tree: ast.AST, owners: tuple[str, ...] = ()) -> Iterator[tuple[str, Function]]:
    """Every function with its dotted name, methods and nested functions included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield ".".join((*owners, node.name)), node
        named = isinstance(node, Function | ast.ClassDef)
        yield from functions_in(node, (*owners, node.name) if named else owners)


def classes_in(source: str) -> dict[str, ast.ClassDef]:
    """Every class by name."""
    return {n.name: n for n in ast.walk(parse(source)) if isinstance(n, ast.ClassDef)}


def modules_in(source: str) -> dict[str, ast.ClassDef]:
    """The classes that are, directly or through another of them, torch modules."""
    classes, found = classes_in(source), {}
    for _ in classes:  # a chain of base classes is no longer than the number of classes
        for name, node in classes.items():
            bases = [ast.unparse(base) for base in node.bases]
            if any(base in found or re.match(r"(torch\.)?nn\.|Module$", base) for base in bases):
                found[name] = node
    return found


def forwards_in(source: str) -> Iterator[tuple[str, Function]]:
    """Each module's forward, and the model's hidden(), which is its forward up to the logits."""
    for name, node in modules_in(source).items():
        for method in node.body:
            if isinstance(method, Function) and method.name in ("forward", "hidden"):
                yield f"{name}.{method.name}", method


def num_lines(node: ast.stmt) -> int:
    """Lines from the first to the last, decorators not counted."""
    return node.end_lineno - node.lineno + 1


def outside(source: str, allowed: Callable[[str], bool]) -> Iterator[ast.AST]:
    """Every node that is not inside a function whose name is allowed."""

    def visit(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if not (isinstance(child, Function) and allowed(child.name)):
                yield child
                yield from visit(child)

    return visit(parse(source))


def called(node: ast.AST) -> str:
    """The name of the function a node calls; empty if it calls none."""
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def assigned_names(node: ast.stmt) -> list[str]:
    """The plain names an assignment binds."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [n.id for t in targets if t is not None for n in ast.walk(t) if isinstance(n, ast.Name)]


def parts_in(source: str) -> list[ast.ClassDef]:
    """The classes whose fields are settings: Config and those that it inherits from."""
    classes = classes_in(source)
    config = classes.get(SETTINGS_CLASS)
    if config is None:
        return []
    bases = [ast.unparse(base) for base in config.bases]
    return [config, *(classes[base] for base in bases if base in classes)]


def settings_in(source: str) -> dict[str, ast.AnnAssign]:
    """The fields of the settings classes."""
    return {
        node.target.id: node
        for part in parts_in(source)
        for node in part.body
        if isinstance(node, ast.AnnAssign) and not ast.unparse(node.annotation).startswith("Class")
    }


# Checks of the layout


def check_banners(source: str) -> list[str]:
    """Each section opens with RULE, '# Title', 1 to 4 lines of reason, RULE; titles as the map."""
    lines, complaints, titles = source.splitlines(), [], []
    rules = [i for i, line in enumerate(lines) if line == RULE]
    for i, line in enumerate(lines):
        if OTHER_RULE.match(line.strip()) and line != RULE:
            complaints.append(f"line {i + 1}: a rule that is not '# ' and 97 '='")
    if len(rules) % 2:
        complaints.append("an odd number of rules")
    for top, bottom in zip(rules[::2], rules[1::2], strict=False):
        inside = lines[top + 1 : bottom]
        if not 2 <= len(inside) <= 5 or not all(re.match(r"# \S", line) for line in inside):
            complaints.append(f"line {top + 1}: a banner is a title and 1 to 4 lines of comment")
        titles.append(inside[0][2:] if inside else "")
    docstring = ast.get_docstring(parse(source), clean=False) or ""
    entries = [m for m in map(MAP_LINE.match, docstring.splitlines()) if m]
    if [int(m[1]) for m in entries] != list(range(1, len(entries) + 1)) or not entries:
        complaints.append("the docstring's map is not numbered from 1")
    if titles != [m[2] for m in entries]:
        complaints.append(f"banners {titles} differ from the map {[m[2] for m in entries]}")
    return complaints


def check_size(source: str) -> list[str]:
    """Columns, and lines that say something: blank ones do not make a file longer to read."""
    lines = source.splitlines()
    complaints = [
        f"line {i}: {len(line)} columns"
        for i, line in enumerate(lines, 1)
        if len(line) > MAX_COLUMNS
    ]
    return complaints


def check_function_lengths(source: str) -> list[str]:
    """No function, train, block forward or model forward beyond its limit."""
    limits = {name: MAX_FUNCTION_LINES for name, _ in functions_in(parse(source))}
    limits |= {"train": MAX_TRAIN_LINES}
    for name, _ in forwards_in(source):
        is_block = name.split(".")[0].endswith("Block")
        limits[name] = MAX_BLOCK_FORWARD_LINES if is_block else MAX_FORWARD_LINES
    return [
        f"{name}: {num_lines(node)} lines, at most {limits[name]}"
        for name, node in functions_in(parse(source))
        if num_lines(node) > limits[name]
    ]


def check_blank_lines(source: str) -> list[str]:
    """Two blank lines before each top-level class and function."""
    lines, complaints = source.splitlines(), []
    for node in parse(source).body:
        if isinstance(node, Function | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            while first > 0 and lines[first - 1].startswith("#"):
                first -= 1
            if lines[max(first - 2, 0) : first] != ["", ""]:
                complaints.append(f"{node.name}: not two blank lines above")
    return complaints


# Checks of the code


def check_environment(source: str) -> list[str]:
    """The environment is read only where settings and rank facts are."""
    names = ("environ", "environb", "getenv", "putenv")
    return [
        f"line {node.lineno}: environment used outside {sorted(ENVIRONMENT_READERS)}"
        for node in outside(source, ENVIRONMENT_READERS.__contains__)
        if isinstance(node, ast.Attribute)
        and node.attr in names
        or isinstance(node, ast.ImportFrom)
        and any(a.name in names for a in node.names)
    ]


def check_getattr_defaults(source: str) -> list[str]:
    """No getattr(x, "literal", default): it hides a missing attribute."""
    return [
        f"line {node.lineno}: getattr with a literal name and a default"
        for node in ast.walk(parse(source))
        if called(node) == "getattr"
        and len(node.args) == 3
        and isinstance(node.args[1], ast.Constant)
    ]


def top_level_names(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """What a module defines, under if and try too."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if getattr(node, "module", "") != "__future__":
                yield from ((a.asname or a.name.split(".")[0], node) for a in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            yield from ((name, node) for name in assigned_names(node))
        else:
            for part in ("body", "orelse", "finalbody"):
                yield from top_level_names(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from top_level_names(handler.body)


def read_names(node: ast.AST) -> set[str]:
    """Names read under a node, those in quoted annotations included."""
    names = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load):
            names.add(child.id)
        for part in ("annotation", "returns"):
            quoted = getattr(child, part, None)
            if isinstance(quoted, ast.Constant) and isinstance(quoted.value, str):
                names |= read_names(ast.parse(quoted.value))
    return names


def check_names_used(source: str) -> list[str]:
    """Every top-level name is read outside its own definition."""
    body = parse(source).body
    reads = {node: read_names(node) for node in body}
    complaints = []
    for name, node in top_level_names(body):
        elsewhere = (reads[other] for other in body if other is not node)
        if not name.startswith("__") and not any(name in names for names in elsewhere):
            complaints.append(f"line {node.lineno}: {name} is never used")
    return complaints


def check_no_global(source: str) -> list[str]:
    """No function rebinds a module's name."""
    return [
        f"line {node.lineno}: global"
        for node in ast.walk(parse(source))
        if isinstance(node, ast.Global)
    ]


def check_prints(source: str) -> list[str]:
    """Only the log and the verbs write to the console."""
    return [
        f"line {node.lineno}: print outside log, main and verbs"
        for node in outside(source, lambda f: f in PRINTERS or f.startswith("verb_"))
        if called(node) == "print"
    ]


def check_forward_ifs(source: str) -> list[str]:
    """At most two conditions in a forward."""
    counts = {
        name: sum(isinstance(n, ast.If | ast.IfExp) for n in ast.walk(node))
        for name, node in forwards_in(source)
    }
    return [
        f"{name}: {count} if, at most {MAX_FORWARD_IFS}"
        for name, count in counts.items()
        if count > MAX_FORWARD_IFS
    ]


# Checks of the text


def documented_nodes(source: str) -> Iterator[tuple[str, ast.AST]]:
    """The module, its classes and its functions."""
    tree = parse(source)
    yield "module", tree
    yield from classes_in(source).items()
    yield from functions_in(tree)


def check_comments(source: str) -> list[str]:
    """Comments and docstrings are ASCII and name neither pull requests nor things to do."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts = [(f"line {t.start[0]}", t.string) for t in tokens if t.type == tokenize.COMMENT]
    texts += [(name, ast.get_docstring(node) or "") for name, node in documented_nodes(source)]
    # A preset reproduces a published system and may say which.
    presets = range(0)
    for node in parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and "PRESETS" in assigned_names(node):
            presets = range(node.lineno, node.end_lineno + 1)
    exempt = {f"line {number}" for number in presets}
    return [f"{where}: not ASCII" for where, text in texts if not text.isascii()] + [
        f"{where}: {FORBIDDEN_IN_COMMENTS.search(text)[0]!r} in a comment"
        for where, text in texts
        if where not in exempt and FORBIDDEN_IN_COMMENTS.search(text)
    ]


def check_docstrings(source: str) -> list[str]:
    """Every class and long function has a docstring; the class's own serves its __init__."""
    return [
        f"{name}: no docstring"
        for name, node in documented_nodes(source)
        if not ast.get_docstring(node)
        and not name.endswith(".__init__")
        and (not isinstance(node, Function) or num_lines(node) > MAX_LINES_WITHOUT_DOCSTRING)
    ]


def check_shapes(source: str) -> list[str]:
    """Every module's forward states shapes, as (B, T, D)."""
    return [
        f"{name}: no shape such as (B, T, D) in its docstring"
        for name, node in forwards_in(source)
        if not SHAPE.search(ast.get_docstring(node) or "")
    ]


# Checks of the settings


def check_settings_class(source: str) -> list[str]:
    """The settings are frozen dataclasses whose every field is declared by a knob."""
    parts = parts_in(source)
    if not parts:
        return [f"no class {SETTINGS_CLASS}"]
    complaints = [
        f"{part.name}: not frozen"
        for part in parts
        if not any("frozen=True" in ast.unparse(d) for d in part.decorator_list)
    ]
    return complaints + [
        f"{name}: not a knob"
        for name, node in settings_in(source).items()
        if not called(node.value).endswith("knob")
    ]


def check_settings_used(source: str) -> list[str]:
    """Every setting is read as cfg.field, or by a property that is itself read so."""
    parts = parts_in(source)
    if not parts:
        return [f"no class {SETTINGS_CLASS}"]

    def fields_read(node: ast.AST, owners: set[str]) -> set[str]:
        return {
            n.attr
            for n in ast.walk(node)
            if isinstance(n, ast.Attribute) and ast.unparse(n.value).split(".")[-1] in owners
        }

    used = set()
    for node in parse(source).body:
        if node not in parts:
            used |= fields_read(node, SETTINGS_OBJECTS)
        if isinstance(node, ast.Assign | ast.AnnAssign) and (
            FIELD_NAME_TABLES & set(assigned_names(node))
        ):
            used |= {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
    methods = {
        n.name: fields_read(n, {"self", "cls"})
        for part in parts
        for n in part.body
        if isinstance(n, Function) and n.name not in NOT_A_USE
    }
    used |= {"preset", "not_ours"}  # from_env acts on them, by their environment names
    while reached := [name for name in methods if name in used]:
        for name in reached:
            used |= methods.pop(name)
    return [f"{name}: never read" for name in settings_in(source) if name not in used]


def published_names(source: str) -> set[str]:
    """Every name the settings accept: fields, aliases and retired names."""
    names = {name.upper() for name in settings_in(source)}
    for node in parse(source).body:
        tables = (
            {"ALIASES", "RETIRED"} & set(assigned_names(node))
            if isinstance(node, ast.Assign | ast.AnnAssign)
            else ()
        )
        for child in ast.walk(node) if tables else ():
            if isinstance(child, ast.Constant) and isinstance(child.value, str):
                names.add(child.value.split("=")[0])
    return names


def command_text(path: Path) -> str:
    """A script's lines, or of a Markdown text what stands in code fences and code spans."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".md":
        return text
    fences = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)
    return "\n".join(fences + re.findall(r"`([^`\n]+)`", text))


def unknown_names(commands: str, source: str) -> list[str]:
    """Names that commands set but no setting, alias or system answers to."""
    given = set(re.findall(r"(?<![\w$.-])([A-Z][A-Z0-9_]+)=(?!=)", commands))
    return sorted(
        name for name in given - published_names(source) if not SYSTEM_NAMES.fullmatch(name)
    )


CHECKS = (
    check_banners,
    check_size,
    check_function_lengths,
    check_blank_lines,
    check_environment,
    check_getattr_defaults,
    check_names_used,
    check_no_global,
    check_prints,
    check_forward_ifs,
    check_comments,
    check_docstrings,
    check_shapes,
    check_settings_class,
    check_settings_used,
)

GOOD = f'''"""Train something small.

  1  Settings        what can be set
  2  Model           the network
"""

import os
from torch import nn

{RULE}
# Settings
# One class reads the environment, so that it can refuse.
{RULE}


def knob(default):
    return default


@dataclass(frozen=True)
class Config:
    """All settings."""

    model_dim: int = knob(8)
    num_heads: int = knob(2)
    muon_lr: float = knob(0.1)

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @classmethod
    def from_env(cls, env=os.environ):
        return cls(**env)


ROUTES = (("blocks", "muon_lr"),)

{RULE}
# Model
# There is one forward.
{RULE}


# It starts as the identity.
class Block(nn.Module):
    """A block."""

    def forward(self, x):
        """x: (B, T, D) -> (B, T, D)."""
        return x if self.gate is None else self.gate(x)


def main() -> None:
    """Print what there is."""
    cfg = Config.from_env(os.environ)
    print(Block(cfg.head_dim), ROUTES)


if __name__ == "__main__":
    main()
'''


def changed(old: str, new: str) -> str:
    """The good source with one thing made bad."""
    assert old in GOOD
    return GOOD.replace(old, new, 1)


BAD = (
    (check_banners, changed("# Model\n", "# Network\n")),
    (check_banners, changed("  2  Model", "  3  Model")),
    (check_banners, changed("# There is one forward.\n", "")),
    (check_banners, changed("ROUTES =", "# -----------\nROUTES =")),
    (check_banners, changed(f"{RULE}\n", f"{RULE}=\n")),
    (check_size, GOOD + "#" * 101),
    (check_function_lengths, GOOD + "def long():\n" + "    pass\n" * 60),
    (check_function_lengths, GOOD + "def train():\n" + "    pass\n" * 80),
    (
        check_function_lengths,
        changed("        return x if", "        x\n" * 13 + "        return x if"),
    ),
    (check_blank_lines, changed("\n\n\ndef main", "\n\ndef main")),
    (check_environment, GOOD + "def f():\n    return os.environ['A']\n"),
    (check_environment, GOOD + "from os import getenv\n"),
    (check_getattr_defaults, GOOD + "x = getattr(x, 'y', None)\n"),
    (check_names_used, GOOD + "def f():\n    return f()\n"),
    (check_names_used, GOOD + "import json\n"),
    (check_names_used, GOOD + "LEFT_OVER = 1\n"),
    (check_no_global, GOOD + "def f():\n    global x\n"),
    (check_prints, GOOD + "def f():\n    print(1)\n"),
    (
        check_forward_ifs,
        changed(
            "return x if self.gate is None else self.gate(x)",
            "return a if a else b if b else c if c else x",
        ),
    ),
    (check_comments, changed("# It starts", "# \u00c9t\u00e9 starts")),
    (check_comments, changed("# It starts", "# As in PR #12, it starts")),
    (check_comments, changed('"""A block."""', '"""A block. TODO: more."""')),
    (check_docstrings, changed('    """A block."""\n\n', "")),
    (check_docstrings, GOOD + "def f():\n" + "    pass\n" * 8),
    (check_shapes, changed("(B, T, D) -> (B, T, D)", "the stream")),
    (check_settings_class, changed("knob(0.1)", "0.1")),
    (check_settings_class, changed("frozen=True", "")),
    (check_settings_used, changed('"muon_lr"', '"matrix_lr"')),
    (check_settings_used, changed("cfg.head_dim", "cfg")),
)


@pytest.fixture(scope="module")
def trainer() -> str:
    """The source under test."""
    return (ROOT / "train_gpt.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_train_gpt(check: Callable[[str], list[str]], trainer: str) -> None:
    complaints = check(trainer)
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check_accepts_good_source(check: Callable[[str], list[str]]) -> None:
    assert check(GOOD) == []


@pytest.mark.parametrize(
    ("check", "source"), BAD, ids=[f"{check.__name__}-{i}" for i, (check, _) in enumerate(BAD)]
)
def test_check_complains_about_bad_source(check: Callable[[str], list[str]], source: str) -> None:
    assert check(source) != []


def test_every_check_was_seen_to_complain() -> None:
    assert {check for check, _ in BAD} == set(CHECKS)


def test_published_commands_name_settings(trainer: str) -> None:
    paths = [
        ROOT / "run.sh",
        ROOT / "README.md",
        ROOT / "data" / "README.md",
        *sorted((ROOT / "records").glob("**/*.md")),
        *sorted((ROOT / "benchmarks").glob("**/*.md")),
    ]
    unknown = {
        str(path.relative_to(ROOT)): names
        for path in paths
        if path.is_file()
        if (names := unknown_names(command_text(path), trainer))
    }
    assert unknown == {}


def test_unknown_names_are_found(tmp_path: Path) -> None:
    text = "```\nMODEL_DIM=8 NUM_HEDS=2 PRESET=mini ./run.sh\n```\nor `MUONLR=1 ./run.sh`, AB=1\n"
    (tmp_path / "README.md").write_text(text)
    assert unknown_names(command_text(tmp_path / "README.md"), GOOD) == ["MUONLR", "NUM_HEDS"]
    retired = GOOD + "ALIASES = {'LATE_QAT=0': 'QAT_MODE=off'}\n"
    assert unknown_names("LATE_QAT=0 TORCH_LOGS=all LATE=0", retired) == ["LATE"]
