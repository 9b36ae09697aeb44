"""What keeps the sources readable and their settings honest, checked on the syntax tree alone.

Every check takes source text and returns complaints, so that each is first shown a bad source it
must complain about, and one good source that all of them must accept. Layout is the formatter's.
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
from trouble import PythonSource

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("train_gpt.py", "plan.py")
MAX_FUNCTION_LINES, MAX_CLASS_LINES = 60, 200
MAX_TOKENS_A_LINE = 10.0  # on average, of lines of code
MAX_LINES_WITHOUT_DOCSTRING = 8
SHAPE = re.compile(r"\((?:\.\.\.|[A-Z]\w*)(?:, ?[\w.*/+ -]+)+\)")
# Where a process asks what surrounds it. Elsewhere a value comes as a setting or an argument.
READ_ENVIRONMENT = ("start", "Run", "Configuration", "Main")
# These name settings without reading them.
NAMING_TABLES = {"PRESETS", "PUBLISHED", "ALIASES", "RETIRED", "VERSION_1_SETTINGS"}
SYSTEM_NAMES = re.compile(
    r"(OMP|NCCL|CUDA|TORCH|TORCHINDUCTOR|PYTORCH|PIP|HF|GLIBC|MATCHED)_\w+|PYTHON|PRESET|CDPATH|IFS"
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def parse(source: str) -> ast.Module:
    """The syntax tree of a source text."""
    return ast.parse(source)


def definitions(source: str, kinds: type | tuple) -> Iterator[tuple[str, ast.AST]]:
    """Every class or function of these kinds with its dotted name, nested ones included."""

    def visit(node: ast.AST, owner: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, Function | ast.ClassDef)
            name = f"{owner}{child.name}" if named else owner
            if isinstance(child, kinds):
                yield name, child
            yield from visit(child, f"{name}." if named else owner)

    yield from visit(parse(source), "")


def num_lines(node: ast.stmt) -> int:
    """Lines from the first to the last, decorators not counted."""
    return node.end_lineno - node.lineno + 1


def assigned_names(node: ast.AST) -> set[str]:
    """The plain names that an assignment binds."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {n.id for t in targets if t is not None for n in ast.walk(t) if isinstance(n, ast.Name)}


def settings_in(source: str) -> set[str]:
    """Names of the fields that are declared as knobs."""
    return {
        node.target.id
        for node in ast.walk(parse(source))
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func).endswith("knob")
    }


# What a reader stumbles over


def check_function_lengths(source: str) -> list[str]:
    """No function is longer than a page."""
    return [
        f"{name}: {num_lines(node)} lines, at most {MAX_FUNCTION_LINES}"
        for name, node in definitions(source, Function)
        if num_lines(node) > MAX_FUNCTION_LINES
    ]


def check_class_lengths(source: str) -> list[str]:
    """No class is longer than a few pages."""
    return [
        f"{name}: {num_lines(node)} lines, at most {MAX_CLASS_LINES}"
        for name, node in definitions(source, ast.ClassDef)
        if num_lines(node) > MAX_CLASS_LINES
    ]


def check_tokens(source: str) -> list[str]:
    """A line of code says few things, on average; docstrings and comments do not count."""
    texts = set()
    for _, node in (("", parse(source)), *definitions(source, (Function, ast.ClassDef))):
        if ast.get_docstring(node):
            texts |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines = [
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in (*layout, tokenize.ENDMARKER) and token.start[0] not in texts
    ]
    average = len(lines) / max(1, len(set(lines)))
    if average <= MAX_TOKENS_A_LINE:
        return []
    return [f"{average:.2f} tokens a line of code, at most {MAX_TOKENS_A_LINE}"]


def check_docstrings(source: str) -> list[str]:
    """Module, classes and long functions have docstrings; a class's own serves its __init__."""
    nodes = [("module", parse(source)), *definitions(source, (Function, ast.ClassDef))]
    return [
        f"{name}: no docstring"
        for name, node in nodes
        if not ast.get_docstring(node)
        and not name.endswith("__init__")
        and (not isinstance(node, Function) or num_lines(node) > MAX_LINES_WITHOUT_DOCSTRING)
    ]


def check_shapes(source: str) -> list[str]:
    """Every module's forward states shapes, as (B, T, D)."""
    modules: set[str] = set()
    classes = [node for _, node in definitions(source, ast.ClassDef)]
    for _ in classes:  # a chain of base classes is no longer than the number of classes
        for node in classes:
            bases = [ast.unparse(base) for base in node.bases]
            if any(base in modules or re.match(r"(torch\.)?nn\.", base) for base in bases):
                modules.add(node.name)
    return [
        f"{name}: no shape such as (B, T, D) in its docstring"
        for name, node in definitions(source, Function)
        if name.split(".")[0] in modules
        and node.name in ("forward", "hidden")
        and not SHAPE.search(ast.get_docstring(node) or "")
    ]


# What hides a mistake


def check_environment(source: str) -> list[str]:
    """The environment is read only where a process looks around and where settings are read."""
    places = PythonSource(source, "start")
    names = ("environ", "environb", "getenv", "putenv")
    return [
        f"line {node.lineno}: the environment is used in section {places.section_of(node)!r}"
        for node in ast.walk(places.tree)
        if (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.ImportFrom) and any(a.name in names for a in node.names))
        if places.section_of(node) not in READ_ENVIRONMENT
    ]


def check_getattr_defaults(source: str) -> list[str]:
    """No getattr(x, "literal", default): it hides a missing attribute."""
    return [
        f"line {node.lineno}: getattr with a literal name and a default"
        for node in ast.walk(parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "getattr"
        and len(node.args) == 3
        and isinstance(node.args[1], ast.Constant)
    ]


def check_no_global(source: str) -> list[str]:
    """No function rebinds a module's name."""
    return [
        f"line {node.lineno}: global"
        for node in ast.walk(parse(source))
        if isinstance(node, ast.Global)
    ]


def check_settings_used(source: str) -> list[str]:
    """Every setting is read, by attribute or through a table that names it, beside its checks."""
    used: set[str] = set()

    def visit(node: ast.AST) -> None:
        is_check = isinstance(node, Function) and node.name == "checks"
        if is_check or assigned_names(node) & NAMING_TABLES:
            return
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            used.add(node.value.lower())  # settings are named as in the environment too
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(parse(source))
    return [f"{name}: never read" for name in sorted(settings_in(source) - used)]


CHECKS = (
    check_function_lengths,
    check_class_lengths,
    check_tokens,
    check_docstrings,
    check_shapes,
    check_environment,
    check_getattr_defaults,
    check_no_global,
    check_settings_used,
)
RULE = "# " + "=" * 97
GOOD = f'''"""Train something small."""

import os
from torch import nn


class Part:
    """What can be set."""

    model_dim: int = model_knob(8)
    muon_lr: float = training_knob(0.1)

    def checks(cfg):
        yield cfg.muon_lr > 0, "MUON_LR must be above 0"


ROUTES = (("blocks", "muon_lr"),)

{RULE}
# Model
# There is one forward.
{RULE}


class Block(nn.Module):
    """A block."""

    def forward(self, x):
        """x: (B, T, D) -> (B, T, D)."""
        return x if self.gate is None else self.gate(x)


{RULE}
# Main
# The story of a run.
{RULE}


def main() -> None:
    """Print what there is."""
    cfg = Config.from_env(os.environ)
    print(Block(cfg.model_dim), ROUTES)
'''


def changed(old: str, new: str) -> str:
    """The good source with one thing made bad."""
    assert old in GOOD
    return GOOD.replace(old, new, 1)


BAD = (
    (check_function_lengths, GOOD + "def long():\n" + "    pass\n" * 60),
    (check_class_lengths, GOOD + "class Long:\n" + "    x = 1\n" * 200),
    (check_tokens, GOOD + "x = 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1\n" * 40),
    (check_docstrings, changed('    """A block."""\n\n', "")),
    (check_docstrings, GOOD + "def f():\n" + "    pass\n" * 8),
    (check_shapes, changed("(B, T, D) -> (B, T, D)", "the stream")),
    (check_shapes, GOOD + "class Other(Block):\n    def forward(self, x):\n        return x\n"),
    (
        check_environment,
        changed("        return x if", "        os.environ['A']\n        return x if"),
    ),
    (
        check_environment,
        changed("# There is", "from os import getenv\n# There is").replace("# Main", "# Data"),
    ),
    (check_getattr_defaults, GOOD + "x = getattr(x, 'y', None)\n"),
    (check_no_global, GOOD + "def f():\n    global x\n"),
    (check_settings_used, changed('"muon_lr"', '"matrix_lr"')),
    (check_settings_used, changed("cfg.model_dim", "cfg")),
)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_sources(check: Callable[[str], list[str]], name: str) -> None:
    complaints = check((ROOT / name).read_text(encoding="utf-8"))
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


# Imports


def imported(source: str, names: set[str]) -> set[str]:
    """Which of the modules a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found & names


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty if none do."""
    left = dict(imports)
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_no_circle_of_imports() -> None:
    paths = [*ROOT.glob("*.py"), *(ROOT / "records").glob("*.py"), *(ROOT / "data").glob("*.py")]
    names = {path.stem for path in paths}
    assert len(names) == len(paths) > 3
    assert not circle({path.stem: imported(path.read_text(), names) for path in paths})


def test_a_circle_is_found() -> None:
    sources = {"a": "import b", "b": "def f():\n    from c import x", "c": "import b.d", "d": ""}
    imports = {name: imported(source, set(sources)) for name, source in sources.items()}
    assert circle(imports) == ["a", "b", "c"]
    assert circle(imports | {"c": set()}) == []


# Commands that people copy


def published_names(source: str) -> set[str]:
    """Every name that the settings accept: fields, aliases and retired names."""
    names = {name.upper() for name in settings_in(source)}
    for node in parse(source).body:
        if assigned_names(node) & {"ALIASES", "RETIRED"}:
            texts = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
            names |= {text.split("=")[0] for text in texts if isinstance(text, str)}
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


def test_published_commands_name_settings() -> None:
    trainer = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
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
    text = "```\nMODEL_DIM=8 MODEL_DIMS=2 PRESET=mini ./run.sh\n```\nor `MUONLR=1 ./run.sh`, AB=1\n"
    (tmp_path / "README.md").write_text(text)
    assert unknown_names(command_text(tmp_path / "README.md"), GOOD) == ["MODEL_DIMS", "MUONLR"]
    retired = GOOD + "ALIASES = {'LATE_QAT=0': 'QAT_MODE=off'}\n"
    assert unknown_names("LATE_QAT=0 TORCH_LOGS=all LATE=0", retired) == ["LATE"]
