"""The messages by which train_gpt.py, plan.py and run.sh refuse, fail or warn, and a page of them.

`python tests/trouble.py` writes TROUBLE.md. What is on the page is read from the sources: a raised
error, the complaint of a part's checks, a line that begins with "warning" or "error". A message
is explained by the first sentence of the docstring (in run.sh, of the comment) above the function
that has it.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "TROUBLE.md"
BLANK = "..."  # stands for what is computed
RULE = re.compile(r"# ={20,}\n# (.+)\n")  # the head of a section
TOLD = re.compile(r"(warning|error|out of memory)\b")  # how lines begin that tell of trouble
# Their texts become part of a message where they are caught, or are never seen.
CAUGHT = ("ValueError", "LinAlgError", "SystemExit", "KeyboardInterrupt")

HEAD = """# When something goes wrong

Errors are one line on the console and say what was given, what was expected and what to do; a
traceback, where there is one, is at the end of the run's `log.txt`. Nothing that was there before
is touched, and no file is half written under its name.

Every message of `train_gpt.py`, `plan.py` and `run.sh` is below, by the sections of those files;
`...` stands for names, numbers and the words of other programs. What it comes from is the first
sentence that the source says there. Messages of `data/prepare.py` are in
[data/README.md](data/README.md).

* refused: exit code 2, before any work. Settings, data or an artifact cannot be used.
* failed: exit code 1, or 128 + n if signal n ended the run. A checkpoint, if there is one, is
  whole; `RESUME=1 RUN_ID=...` goes on from it. While a run works, `rank ..., during ...:` and the
  kind of the error stand before the message.
  An artifact over the byte limit is there and scored; its exit code is 3.
* warning: the run goes on.

This page is written by `python tests/trouble.py`; `./run.sh test` causes each message once.
"""


@dataclass(frozen=True, order=True)
class Message:
    """A template, where it stands and what it means."""

    section: str
    text: str
    effect: str  # "refused", "failed" or "warning"
    reason: str

    @property
    def pattern(self) -> re.Pattern:
        """Finds what the template prints."""
        return re.compile(".*".join(map(re.escape, self.text.split(BLANK))))


def tidy(text: str) -> str:
    """A template in one line, without the word that a console line begins with."""
    text = re.sub(r"\s+", " ", text.strip())
    return re.sub(r"(\.\.\.){2,}", BLANK, text.removeprefix("error: "))


def says_something(text: str) -> bool:
    """Whether a template has words of its own."""
    return len(re.sub(r"\W|\d|_", "", text)) > 6


def is_phrase(text: str) -> bool:
    """Whether a text is more than one word: a name in a message is no template of its own."""
    return " " in text.strip() and re.search(r"[a-z]{2}", text) is not None


def first_sentence(text: str | None) -> str:
    """The first sentence of a docstring or comment, in one line."""
    paragraph = re.sub(r"\s+", " ", (text or "").strip().split("\n\n")[0])
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", paragraph)[0]


def product(pieces: Iterable[list[str]]) -> list[str]:
    """Every text that takes one alternative for each piece."""
    return ["".join(choice) for choice in itertools.product(*pieces)]


class PythonSource:
    """A file of Python: its functions, who calls them, and the texts that its expressions give."""

    def __init__(self, source: str, title: str = "") -> None:
        self.title = title  # of what stands before the first section
        self.tree = ast.parse(source)
        self.parents: dict[ast.AST, ast.AST] = {
            child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)
        }
        self.settings = {
            node.target.id.upper()
            for node in ast.walk(self.tree)
            if isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func).endswith("knob")
        }
        self.sections = [
            (source.count("\n", 0, found.start()), found[1]) for found in RULE.finditer(source)
        ]
        self.looked_up: list[ast.Name] = []
        self.calls: dict[str, list[ast.Call]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rpartition(".")[2]
                self.calls.setdefault(name, []).append(node)

    def function_of(self, node: ast.AST) -> ast.FunctionDef | None:
        """The function that a node stands in."""
        while node in self.parents:
            node = self.parents[node]
            if isinstance(node, ast.FunctionDef):
                return node
        return None

    def section_of(self, node: ast.AST) -> str:
        """The title of the section that a node stands in."""
        started = [title for line, title in self.sections if line <= node.lineno]
        return started[-1] if started else self.title

    def reason_of(self, node: ast.AST) -> str:
        """The first sentence of the nearest docstring around a node."""
        while node in self.parents:
            node = self.parents[node]
            documented = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if documented and (sentence := first_sentence(ast.get_docstring(node))):
                return sentence
        return ""

    def texts(self, node: ast.AST) -> list[tuple[str, ast.AST]]:
        """Templates that an expression may give, each with the node that has its words."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [(node.value, node)]
        if isinstance(node, ast.IfExp):
            return [*self.texts(node.body), *self.texts(node.orelse)]
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Dict):
            return [text for value in node.value.values for text in self.texts(value)]
        if isinstance(node, ast.JoinedStr):
            return self.joined(node.values, node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.joined([node.left, node.right], node)
        if isinstance(node, ast.FormattedValue):
            found = {text if is_phrase(text) else BLANK: at for text, at in self.texts(node.value)}
            return [*found.items()]
        if isinstance(node, ast.Name) and node not in self.looked_up:
            self.looked_up.append(node)  # a name may stand for something made from itself
            found = [self.texts(value) or [(BLANK, node)] for value in self.values_of(node)]
            self.looked_up.pop()
            return [*itertools.chain(*found)]
        return []

    def joined(self, pieces: list[ast.expr], node: ast.AST) -> list[tuple[str, ast.AST]]:
        """Templates of several pieces after each other."""
        found = [self.texts(piece) or [(BLANK, node)] for piece in pieces]
        # A phrase that came from elsewhere is explained where it stands.
        return [
            (
                "".join(text for text, _ in choice),
                next(
                    (at for _, at in choice if self.function_of(at) != self.function_of(node)), node
                ),
            )
            for choice in itertools.product(*found)
        ]

    def values_of(self, name: ast.Name) -> Iterator[ast.AST]:
        """Expressions that a name in a function may stand for."""
        function = self.function_of(name)
        if function is None:
            return
        parameters = [argument.arg for argument in function.args.args]
        if name.id in parameters:
            position = parameters.index(name.id) - (parameters[0] in ("self", "cls"))
            for call in self.calls.get(function.name, []):
                if 0 <= position < len(call.args):
                    yield call.args[position]
            return
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    yield from self.assigned(name.id, target, node.value)
            if (
                isinstance(node, ast.For)
                and isinstance(node.target, ast.Name)
                and node.target.id == name.id
                and isinstance(node.iter, ast.Call)
            ):
                yield from self.items_of(ast.unparse(node.iter.func))

    def assigned(self, name: str, target: ast.AST, value: ast.AST) -> Iterator[ast.AST]:
        """What an assignment gives a name."""
        if isinstance(target, ast.Name) and target.id == name:
            yield value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for part, given in zip(target.elts, value.elts, strict=False):
                yield from self.assigned(name, part, given)

    def items_of(self, name: str) -> Iterator[ast.AST]:
        """Texts beside conditions, or yielded, in a function of this name."""
        for function in ast.walk(self.tree):
            if isinstance(function, ast.FunctionDef) and function.name == name:
                for node in ast.walk(function):
                    said = node.value if isinstance(node, ast.Yield) else None
                    if isinstance(node, ast.Tuple) and len(node.elts) == 2:
                        said = node.elts[1]
                    if isinstance(said, ast.Constant | ast.JoinedStr):
                        yield said

    def messages(self) -> list[Message]:
        """Every message of the file, in order."""
        found = [
            (at.lineno, Message(self.section_of(at), text, effect, self.reason_of(at)))
            for node in ast.walk(self.tree)
            for effect, text, at in self.trouble_at(node)
            if says_something(text)
        ]
        return [message for _, message in sorted(found)]

    def trouble_at(self, node: ast.AST) -> Iterator[tuple[str, str, ast.AST]]:
        """The effect, text and place of what a node refuses, fails with, or tells."""
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            name = ast.unparse(node.exc.func).rpartition(".")[2]
            effect = "refused" if name == "Refusal" else "failed"
            if name[0].islower():  # the caller says which
                effect = "refused or failed"
            for text, at in self.texts(node.exc.args[-1]) if name not in CAUGHT else ():
                yield effect, tidy(text), at
        elif isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple):
            function = self.function_of(node)
            if function is not None and function.name == "checks":
                for text, at in self.texts(node.value.elts[-1]):
                    yield "refused", tidy(self.with_values(text)), at
        elif isinstance(node, ast.Call) and node.args and self.may_tell(node.args[0]):
            for text, at in self.texts(node.args[0]):
                if TOLD.match(text):
                    effect = "failed" if text.startswith("error") else "warning"
                    yield effect, tidy(re.sub(r"\{[^{}]*\}", BLANK, text)), at

    def may_tell(self, node: ast.expr) -> bool:
        """Whether an expression may give a text that tells of trouble; quick to say."""
        if isinstance(node, ast.JoinedStr) and node.values:
            return self.may_tell(node.values[0])
        if isinstance(node, ast.BinOp):
            return self.may_tell(node.left)
        if isinstance(node, ast.Constant):
            return isinstance(node.value, str) and TOLD.match(node.value) is not None
        return isinstance(node, ast.Name | ast.IfExp)

    def with_values(self, complaint: str) -> str:
        """A complaint of a check as it is printed: names of settings with their values."""
        names = "|".join(sorted(self.settings, key=len, reverse=True))
        return re.sub(rf"\b({names})\b(?!=)", rf"\1={BLANK}", complaint)


def shell_messages(source: str) -> Iterator[Message]:
    """What a shell script dies of or warns of, by its functions' comments."""
    strings = r'((?:"[^"]*"|\\\n|[ \n])+)'
    for found in re.finditer(rf"\b(die|warn) {strings}", source):
        text = " ".join(re.findall(r'"([^"]*)"', found[2]))
        text = re.sub(r"\$\([^)]*\)|\$\{[^}]*\}|\$\w+|\$[*@]", BLANK, text)
        before = source[: found.start()]
        comments = re.findall(r"((?:^#.*\n)*)^\w+\(\) \{", before, re.M)
        comment = re.sub(r"^# ?", "", comments[-1], flags=re.M) if comments else ""
        effect = "failed" if found[1] == "die" else "warning"
        if says_something(text):
            yield Message("run.sh", "run.sh: " + tidy(text), effect, first_sentence(comment))


def all_messages() -> list[Message]:
    """Every message, once, in the order of the files' sections."""
    found: list[Message] = []
    for name in ("train_gpt.py", "plan.py"):
        found += PythonSource((ROOT / name).read_text(encoding="utf-8"), name).messages()
    found += shell_messages((ROOT / "run.sh").read_text(encoding="utf-8"))
    return list({message.text: message for message in reversed(found)}.values())[::-1]


def page() -> str:
    """The text of TROUBLE.md."""
    lines = [HEAD]
    for section, messages in itertools.groupby(all_messages(), lambda message: message.section):
        lines += [
            f"## {section}\n",
            "| message | effect | comes from |",
            "|---|---|---|",
        ]
        for message in messages:
            text, reason = message.text.replace("|", "\\|"), message.reason.replace("|", "\\|")
            lines.append(f"| `{text}` | {message.effect} | {reason} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {len(all_messages())} messages")
