"""What happens to people while data/prepare.py runs: kills, full disks, swapped files, bombs."""

from __future__ import annotations

import builtins
import errno
import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import zstandard
from jobs import NO_NETWORK
from test_prepare import (
    ROOT,
    VOCAB,
    assert_one_error,
    json_lines,
    make_texts,
    model_bytes,
    run_main,
    small_tokenizer,
    tree,
    words,
)

import train_gpt
from data import prepare

import documents  # isort: skip
import shards  # isort: skip

NAME = f"t_sp{VOCAB}"


class Build:
    """A small build of four training shards with a given tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.data, self.model = self.out / "datasets" / NAME, folder / "given.model"
        folder.mkdir(exist_ok=True)
        self.model.write_bytes(model_bytes())
        self.source = folder / "t.jsonl"
        self.source.write_bytes(json_lines(make_texts(12)))
        self.argv = ["text", self.source, "--tokenizer", self.model, "--out", self.out]
        self.argv += ["--shard-tokens", 1500, "--val-fraction", 0.2, "--workers", 1]

    def run(self, *more: object) -> int:
        """Run it in this process."""
        return prepare.main([str(x) for x in (*self.argv, *more)])

    def killed(self, patch: object) -> bool:
        """Run it in a fork of this process after calling `patch`; say whether it was killed."""
        if (child := os.fork()) == 0:
            status = 99
            try:
                sys.stdout = io.StringIO()
                patch()
                status = self.run()
            finally:
                os._exit(status)
        _, state = os.waitpid(child, 0)
        if os.WIFSIGNALED(state):
            return True
        assert os.waitstatus_to_exitcode(state) == 0
        return False


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """A build that nothing has happened to yet."""
    return Build(tmp_path / "place")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The hashes that an undisturbed build ends with."""
    build = Build(tmp_path_factory.mktemp("undisturbed"))
    assert build.run() == 0
    hashes = tree(build.out)
    assert len(hashes) >= 7
    return hashes


def left_over(out: Path) -> list[Path]:
    """Return what a build was made of on the way and should have cleared away."""
    return [path for path in out.rglob("*") if path.name.startswith(".")]


# Death and Ctrl-C


@pytest.mark.parametrize("call", ["replace", "fsync", "rename"])
def test_killed_at_every_change_of_a_file(build, expected, capsys, monkeypatch, call):
    """SIGKILL before each call in turn, every build going on where the last one died."""
    original, deaths = getattr(os, call), 0

    def die_at(number: int) -> None:
        calls = iter(range(number))

        def deadly(*args, **more):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **more)

        monkeypatch.setattr(os, call, deadly)

    for number in (0, 1, 2, 3, 5, 8, 13, 99):
        deaths += build.killed(lambda number=number: die_at(number))
        assert all(expected[name] == sha for name, sha in tree(build.out).items())
    assert deaths >= (1 if call == "rename" else 3)
    assert build.run() == 0
    assert tree(build.out) == expected
    assert not left_over(build.out)


def test_ctrl_c_while_the_tokenizer_reads(build, capsys, monkeypatch):
    def interrupted(survey):
        yield "some text"
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "training_texts", interrupted)
    argv = ["text", build.source, "--vocab-size", VOCAB, "--out", build.out]
    assert_one_error(run_main(capsys, *argv), 130, "interrupted")


SIGNALLED = """
import os, runpy, signal, sys
replace, calls = os.replace, iter(range(99))
def planted(*paths):
    if next(calls) == 5:
        os.kill(os.getpid(), number)
    return replace(*paths)
os.replace = planted
number, program = int(sys.argv[1]), sys.argv[2]
sys.argv[1:] = sys.argv[3:]
runpy.run_path(program, run_name="__main__")
"""


@pytest.mark.parametrize("number", train_gpt.END_SIGNALS)  # whatever ends a run ends this too
def test_a_signal_is_one_line_and_the_next_run_goes_on(build, expected, number):
    program = str(ROOT / "data" / "prepare.py")
    argv = [str(number.value), program, *map(str, build.argv)]
    done = subprocess.run(
        [sys.executable, "-B", "-c", SIGNALLED, *argv], capture_output=True, text=True
    )
    assert_one_error((done.returncode, "", done.stderr), 128 + number, "interrupted")
    assert not build.data.exists() and not left_over(build.out)
    assert build.run() == 0
    assert tree(build.out) == expected


# Disks and folders


def limited_disk(monkeypatch: pytest.MonkeyPatch, room: int, error: int) -> None:
    """Let writes of prepare.py fail for good, in the middle, after `room` bytes."""
    left = room

    class Limited(io.BufferedWriter):
        def write(self, content) -> int:
            nonlocal left
            size = memoryview(content).nbytes
            taken = min(size, left)
            left -= taken
            super().write(memoryview(content).cast("B")[:taken])
            if taken < size:
                raise OSError(error, os.strerror(error))
            return size

    def limited_open(path, mode="r", **more):
        return Limited(io.FileIO(path, mode)) if "w" in mode else builtins.open(path, mode, **more)

    monkeypatch.setattr(shards, "open", limited_open, raising=False)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_disk_that_fills_up_at_any_point(build, expected, capsys, monkeypatch, error):
    """One line that names a file, nothing partial, and the next run ends with the same bytes."""
    rng, refused = random.Random(error), 0
    rooms = [0, 1, 500, *(rng.randint(0, 45_000) for _ in range(9))]
    for room in rooms:
        shutil.rmtree(build.out, ignore_errors=True)
        with monkeypatch.context() as patch:
            limited_disk(patch, room, error)
            outcome = run_main(capsys, *build.argv)
        if outcome[0]:
            refused += 1
            advice = () if error == errno.EIO else ("free some space",)
            assert_one_error(outcome, 1, str(build.out), os.strerror(error), *advice)
        assert all(expected[name] == sha for name, sha in tree(build.out).items())
        assert not left_over(build.out)
        assert build.run() == 0
        assert tree(build.out) == expected
    assert refused > 6


@pytest.mark.parametrize("in_the_way", ["", "datasets", "tokenizers"])
def test_a_file_where_a_folder_should_be(build, capsys, in_the_way):
    (build.out / in_the_way).parent.mkdir(parents=True, exist_ok=True)
    (build.out / in_the_way).write_text("mine")
    outcome = run_main(capsys, *build.argv)
    assert_one_error(outcome, 1, str(build.out / in_the_way))
    assert (build.out / in_the_way).read_text() == "mine"


@pytest.mark.parametrize("name", ["fineweb_val.json", "notes.txt", "fineweb_train_000000.bin", ""])
def test_what_is_in_the_folder_is_left_alone(build, capsys, name):
    """A file under the data set's name, or anything in its folder, is refused and not touched."""
    mine = build.data / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    assert_one_error(run_main(capsys, *build.argv), 2, str(build.data), "move it away")
    assert mine.read_text() == "mine"
    assert [path for path in build.out.rglob("*") if path.is_file()] == [mine]


def test_a_folder_where_a_file_should_be(build, capsys):
    (build.data / "fineweb_val.json").mkdir(parents=True)
    name = f"{build.data / 'fineweb_val.json'}: Is a directory"
    assert_one_error(run_main(capsys, *build.argv), 1, name)


def test_an_empty_folder_is_filled(build, expected):
    build.data.mkdir(parents=True)
    assert build.run() == 0
    assert tree(build.out) == expected


def test_folders_without_permission(build, capsys):
    """What cannot be written is one line; what cannot be read is not passed over."""
    closed = build.folder / "texts" / "closed"
    closed.mkdir(parents=True)
    (closed / "a.txt").write_text("a")
    (build.folder / "texts" / "b.jsonl").write_bytes(json_lines(["b", "c"]))
    closed.chmod(0)
    # The superuser may do everything; what is imported may be for its eyes only.
    code = "import os, sys; sys.path.insert(0, sys.argv.pop(1)); import prepare; "
    code += "import sentencepiece, heapq; "
    code += "import importlib.metadata as m; m.version = {d.name: d.version for d in "
    code += "m.distributions()}.__getitem__; "
    code += "os.getuid() or os.setuid(65534); sys.exit(prepare.main(sys.argv[1:]))"
    build.folder.chmod(0o755)
    for path in (build.folder, *build.folder.parents[:4]):
        path.chmod(path.stat().st_mode | 0o055)
    common = [sys.executable, "-B", "-c", code, str(ROOT / "data"), "text"]
    options = ["--tokenizer", str(build.model), "--out"]
    for source, out, named in (
        (closed.parent, build.out, closed),
        (build.source, build.folder / "sealed" / "out", build.folder / "sealed"),
    ):
        (build.folder / "sealed").mkdir(exist_ok=True)
        (build.folder / "sealed").chmod(0o555)
        done = subprocess.run(
            [*common, str(source), *options, str(out)], capture_output=True, text=True
        )
        assert_one_error((done.returncode, "", done.stderr), 1, f"{named}", "Permission denied")
    closed.chmod(0o755)


# What changes between or during runs


def test_another_tokenizer_is_there(build, expected, capsys):
    """Of the same name, in place or at the source: what is in place is not lost."""
    other = prepare.train_tokenizer([words(4000, seed=5)], VOCAB, 0)
    place = build.out / "tokenizers/given.model"
    place.parent.mkdir(parents=True)
    place.write_bytes(other)
    assert_one_error(run_main(capsys, *build.argv), 2, str(place), "move it away")
    assert tree(build.out).keys() == {"tokenizers/given.model"} and place.read_bytes() == other
    place.unlink()
    assert build.run() == 0
    place.write_bytes(other)
    assert_one_error(run_main(capsys, *build.argv), 2, str(place), "put back what it was")
    place.write_bytes(model_bytes())
    build.model.write_bytes(other)
    assert_one_error(run_main(capsys, *build.argv), 2, "other input")
    assert tree(build.out) == expected


@pytest.mark.parametrize("kind", ["own", "given"])
def test_input_that_changes_while_it_is_read(build, capsys, monkeypatch, kind):
    """In the second pass, also for a while: no data set is made of it."""
    original, reads = build.source.read_bytes(), iter(range(9))
    read = documents.read_documents

    def changing(files, reading):
        if next(reads) == 1:
            build.source.write_bytes(original.replace(b"ba", b"ke", 40))
            yield from read(files, reading)
            build.source.write_bytes(original)
        else:
            yield from read(files, reading)

    monkeypatch.setattr(documents, "read_documents", changing)
    argv = build.argv
    if kind == "own":
        argv = ["text", build.source, "--vocab-size", VOCAB, "--out", build.out]
    assert_one_error(run_main(capsys, *argv), 1, "the input changed while it was read")
    assert not tree(build.out) and not left_over(build.out)


def test_damaged_records_are_no_traceback(build, expected, capsys):
    """Random bytes and random values in the sidecar: one line, or nothing that matters changed."""
    assert build.run() == 0
    rng, ended = random.Random(0), set()
    path = build.data / "fineweb_val.json"
    original = path.read_bytes()
    for number in range(80):
        content = bytearray(original)
        if number % 2:
            for _ in range(rng.choice([1, 3, 40])):
                content[rng.randrange(len(content))] = rng.choice(b' "{}[],:0-9nxe\n\xff\0')
        else:
            value = json.loads(content)
            inner = rng.choice([value, *(v for v in value.values() if isinstance(v, dict))])
            inner[rng.choice(list(inner))] = rng.choice(
                [None, -1, "x", [], {}, [1], "../../x", 1e99]
            )
            content = json.dumps(value).encode()
        path.write_bytes(content)
        code, _, stderr = run_main(capsys, *build.argv)
        assert code in (0, 2) and stderr.count("\n") == (code > 0), (content, stderr)
        ended.add(code)
        assert path.read_bytes() == content
        path.write_bytes(original)
        assert tree(build.out) == expected
    assert ended == {0, 2}


def test_builds_that_share_a_tokenizer(build, capsys):
    """Several at once put the same file in place: none fails, and it is never half there."""
    outcomes: list[int] = []
    names = [f"n{i}" for i in range(6)]
    threads = [
        threading.Thread(target=lambda name=name: outcomes.append(build.run("--name", name)))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [0] * len(names)
    assert (build.out / "tokenizers/given.model").read_bytes() == model_bytes()


# Documents


def test_files_that_macos_leaves_on_disks_are_no_texts(tmp_path):
    for name in ("a.txt", "._a.txt", ".hidden.txt"):
        (tmp_path / name).write_text("text")
    found, others = documents.files_in(tmp_path)
    assert [path.name for path in found] == [".hidden.txt", "a.txt"] and others.total() == 1


def test_empty_and_shared_documents_are_counted(build, capsys):
    texts = make_texts(6)
    build.source.write_bytes(json_lines(["", *texts, "", texts[2]]))
    val = build.folder / "v.jsonl"
    val.write_bytes(json_lines([texts[2], "", "new"]))
    argv = [x for x in build.argv if x not in ("--val-fraction", 0.2)]
    code, stdout, _ = run_main(capsys, *argv, "--val", val)
    assert code == 0 and "left out 3 empty documents and 2 training documents that" in stdout
    sidecar = prepare.read_json(build.data / "fineweb_val.json")
    assert sidecar["documents"] == 2 and sidecar["train"]["documents"] == 5


def test_copies_of_a_text_are_on_one_side(build):
    texts = make_texts(40)
    build.source.write_bytes(json_lines(texts + texts[::-1] + texts))
    assert build.run() == 0
    found = {}
    for split in ("train", "val"):
        texts_ids = prepare.iter_documents(prepare.shard_paths(build.data, split))
        found[split] = [small_tokenizer().decode(ids) for ids in texts_ids]
    assert not set(found["train"]) & set(found["val"])
    assert sorted(found["train"] + found["val"]) == sorted(texts * 3)


MEASURED = """
import resource, sys
sys.path.insert(0, sys.argv.pop(1))
import prepare
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = prepare.main(sys.argv[1:])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
sys.exit(status)
"""
LINE = b'{"text": "' + b"abcdefgh " * (200 * 2**20 // 9) + b'"}'
BOMBS = {
    "a line of 200 MB.jsonl": lambda: LINE,
    "a text of 200 MB.txt": lambda: LINE,
    "a line of 200 MB.jsonl.gz": lambda: gzip.compress(LINE, 1),
    "a line of 200 MB.jsonl.zst": lambda: zstandard.compress(LINE),
    "a line in one frame.jsonl.zst": lambda: zstandard.compress(bytes(2**26) + b"\n" + LINE),
    "256 MB of blanks.jsonl.zst": lambda: zstandard.compress(b"\n" * 2**27) * 2,
    "brackets.jsonl": lambda: b"[" * (15 << 20),
}


# The others take seconds and fail in the same way.
QUICK = {"a line of 200 MB.jsonl.zst", "a text of 200 MB.txt", "brackets.jsonl"}


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in BOMBS]
)
def test_memory_is_bounded(build, name):
    """Whatever a file unpacks to, no more than a few hundred MB are held, and it is one line."""
    (build.folder / name).write_bytes(BOMBS[name]())
    other = build.folder / "other.txt"  # a text alone would be cut into documents
    other.write_text("a text that is nothing special")
    command = [sys.executable, "-c", MEASURED, str(ROOT / "data"), "text", str(build.folder / name)]
    command += [str(other), "--tokenizer", str(build.model), "--out", str(build.out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    expected = "none left for training" if "blanks" in name else name
    assert done.returncode == 2 and expected in done.stderr and "error: " in done.stderr
    assert int(done.stdout.splitlines()[-1]) < 450


# No network

BLOCKED = (
    NO_NETWORK
    + """
sys.path.insert(0, sys.argv.pop(1))
import prepare
from pathlib import Path
prepare.docstrings.PACKAGES = ("mpmath",)
if __name__ == "__main__":
    sys.exit(prepare.main(sys.argv[1:]))
"""
)


@pytest.mark.parametrize("command", ["docs", "text"])
def test_no_socket_is_opened(build, command):
    """Neither to build the corpus of docs (here of one package) nor of texts."""
    script = build.folder / "blocked.py"
    script.write_text(BLOCKED)
    argv = [command, *([build.source] if command == "text" else []), "--out", build.out]
    argv = [sys.executable, script, ROOT / "data", *argv, "--vocab-size", 500, "--workers", 2]
    done = subprocess.run(map(str, argv), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list(build.out.rglob("fineweb_val.json"))) == 1
