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

from data import prepare

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


# Death and Ctrl-C


@pytest.mark.parametrize("call", ["replace", "fsync", "unlink"])
def test_killed_at_every_change_of_a_file(build, expected, capsys, monkeypatch, call):
    """SIGKILL before each call in turn, every build going on where the last one died."""
    original, deaths = getattr(os, call), 0

    def die_at(number: int) -> None:
        calls = iter(range(number))

        def deadly(*args, **more):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **more)

        monkeypatch.setattr(prepare.os, call, deadly)

    for number in (0, 1, 2, 3, 5, 8, 13, 99):
        deaths += build.killed(lambda number=number: die_at(number))
        assert all(expected[name] == sha for name, sha in tree(build.out).items())
    assert deaths >= (0 if call == "unlink" else 3)
    assert build.run() == 0
    assert tree(build.out) == expected
    assert not list(build.out.rglob(".*.tmp"))


def test_ctrl_c_while_the_tokenizer_reads(build, capsys, monkeypatch):
    def interrupted(*args):
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_one_line_and_the_next_run_goes_on(build, expected, number):
    program = str(ROOT / "data" / "prepare.py")
    argv = [str(number.value), program, *map(str, build.argv)]
    done = subprocess.run(
        [sys.executable, "-B", "-c", SIGNALLED, *argv], capture_output=True, text=True
    )
    assert_one_error((done.returncode, "", done.stderr), 128 + number, "interrupted")
    assert len(list(build.data.glob("*.bin"))) > 0 and not list(build.out.rglob(".*.tmp"))
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

    monkeypatch.setattr(prepare, "open", limited_open, raising=False)


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
        assert not list(build.out.rglob(".*.tmp"))
        assert build.run() == 0
        assert tree(build.out) == expected
    assert refused > 6


@pytest.mark.parametrize("in_the_way", ["", "datasets", f"datasets/{NAME}", "tokenizers"])
def test_a_file_where_a_folder_should_be(build, capsys, in_the_way):
    (build.out / in_the_way).parent.mkdir(parents=True, exist_ok=True)
    (build.out / in_the_way).write_text("mine")
    outcome = run_main(capsys, *build.argv)
    assert_one_error(outcome, 1, str(build.out / in_the_way))
    assert (build.out / in_the_way).read_text() == "mine"


@pytest.mark.parametrize("name", ["fineweb_val.json", ".build.json", ".lock"])
def test_a_folder_where_a_file_should_be(build, capsys, name):
    (build.data / name).mkdir(parents=True)
    assert_one_error(run_main(capsys, *build.argv), 1, f"{build.data / name}: Is a directory")


def test_folders_without_permission(build, capsys):
    """What cannot be written is one line; what cannot be read is not passed over."""
    closed = build.folder / "texts" / "closed"
    closed.mkdir(parents=True)
    (closed / "a.txt").write_text("a")
    (build.folder / "texts" / "b.jsonl").write_bytes(json_lines(["b", "c"]))
    closed.chmod(0)
    # The superuser may do everything; what is imported may be for its eyes only.
    code = "import os, sys; sys.path.insert(0, sys.argv.pop(1)); import prepare, sentencepiece; "
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


def interrupted_after(build: Build, shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a build that was interrupted when `shards` shards had been finished."""
    write, written = prepare.write_shard, []

    def stop(path, tokens):
        if len(written) == shards:
            raise KeyboardInterrupt
        written.append(path)
        write(path, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_shard", stop)
        assert build.run() == 130
    assert len(list(build.data.glob("*.bin"))) == shards


def test_another_tokenizer_between_two_runs(build, expected, monkeypatch):
    """Of the same name and size, at the source or in place: never shards of two tokenizers."""
    other = prepare.train_tokenizer([words(4000, seed=5)], VOCAB, 0)
    interrupted_after(build, 3, monkeypatch)
    (build.out / "tokenizers/given.model").write_bytes(other)
    assert build.run() == 0
    assert tree(build.out) == expected

    shutil.rmtree(build.out)
    interrupted_after(build, 3, monkeypatch)
    build.model.write_bytes(other)
    assert build.run() == 0
    fresh = Build(build.folder / "fresh")
    fresh.model.write_bytes(other)
    assert fresh.run() == 0
    assert tree(build.out) == tree(fresh.out) != expected


def test_a_tokenizer_changed_after_the_build_is_put_back(build, expected, capsys):
    assert build.run() == 0
    other = prepare.train_tokenizer([words(4000, seed=5)], VOCAB, 0)
    (build.out / "tokenizers/given.model").write_bytes(other)
    code, _, stderr = run_main(capsys, *build.argv)
    assert code == 0 and stderr.startswith("warning: ") and "given.model" in stderr
    assert tree(build.out) == expected


def test_input_that_changes_and_changes_back(build, expected, capsys, monkeypatch):
    """Shards of a text that was different for a while are not kept."""
    original, encode = build.source.read_bytes(), prepare.encode_split

    def change(plan, survey, tokenizer, journal, split) -> None:
        if split == "train":
            build.source.write_bytes(original.replace(b"ba", b"ke", 40))
        encode(plan, survey, tokenizer, journal, split)

    batches = prepare.batches
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "encode_split", change)
        # Else all of a small text is read, and refused, before its first shard.
        patch.setattr(prepare, "batches", lambda documents: batches(documents, limit=1))
        interrupted_after(build, 3, patch)
    assert tree(build.out).items() - expected.items()
    build.source.write_bytes(original)
    assert_one_error(run_main(capsys, *build.argv), 1, "the input changed while it was read")
    assert build.run() == 0
    assert tree(build.out) == expected


def test_damaged_records_are_no_traceback(build, expected, capsys):
    """Random bytes and random values in sidecar and journal: repaired, or one line."""
    assert build.run() == 0
    rng, ended = random.Random(0), set()
    originals = {
        name: (build.data / name).read_bytes() for name in ("fineweb_val.json", ".build.json")
    }
    for number in range(80):
        name = rng.choice(list(originals))
        content = bytearray(originals[name])
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
        (build.data / name).write_bytes(content)
        if rng.random() < 0.5 and name == ".build.json":
            (build.data / "fineweb_val.json").unlink(missing_ok=True)
        code, _, stderr = run_main(capsys, *build.argv)
        assert code in (0, 2) and stderr.count("\n") <= 1, (content, stderr)
        ended.add(code)
        if code == 2:
            assert "other input" in stderr or "not written by prepare.py" in stderr, stderr
        for kept, original in originals.items():
            (build.data / kept).write_bytes(original)
        shards = {n: sha for n, sha in tree(build.out).items() if not n.endswith(".json")}
        assert shards.items() <= expected.items()
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


def test_a_tokenizer_of_an_unfinished_build_is_not_replaced(tmp_path):
    """No sidecar names it yet, but shards are being written with it."""
    path, folder = tmp_path / "tokenizers" / "m.model", tmp_path / "datasets" / "under_way"
    folder.mkdir(parents=True)
    prepare.place_tokenizer(path, b"first")
    prepare.write_json(folder / prepare.JOURNAL, {"tokenizer_sha256": prepare.file_sha256(path)})
    with pytest.raises(prepare.BadInput, match="in use by under_way"):
        prepare.place_tokenizer(path, b"second")
    assert path.read_bytes() == b"first"
    prepare.write_json(folder / prepare.JOURNAL, {"tokenizer_sha256": None})
    prepare.place_tokenizer(path, b"second")
    assert path.read_bytes() == b"second"


# Documents


def test_files_that_macos_leaves_on_disks_are_no_texts(tmp_path):
    for name in ("a.txt", "._a.txt", ".hidden.txt"):
        (tmp_path / name).write_text("text")
    assert [path.name for path in prepare.text_files_in(tmp_path)] == [".hidden.txt", "a.txt"]


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
        documents = prepare.iter_documents(prepare.shard_paths(build.data, split))
        found[split] = [small_tokenizer().decode([int(i) for i in ids[1:]]) for ids in documents]
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
    "1 GB of blanks.jsonl.zst": lambda: zstandard.compress(b"\n" * 2**27) * 8,
    "brackets.jsonl": lambda: b"[" * (15 << 20),
}


@pytest.mark.parametrize("name", BOMBS)
def test_memory_is_bounded(build, name):
    """Whatever a file unpacks to, no more than a few hundred MB are held, and it is one line."""
    (build.folder / name).write_bytes(BOMBS[name]())
    command = [sys.executable, "-c", MEASURED, str(ROOT / "data"), "text", str(build.folder / name)]
    command += ["--tokenizer", str(build.model), "--out", str(build.out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    expected = "no document with any text" if "blanks" in name else name
    assert_one_error((done.returncode, done.stdout, done.stderr), 2, expected)
    assert int(done.stdout) < 450


# No network

BLOCKED = (
    NO_NETWORK
    + """
sys.path.insert(0, sys.argv.pop(1))
import prepare
from pathlib import Path
prepare.DOCS_PACKAGES = ("mpmath",)
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
