"""data/prepare.py fineweb, run as a process against a hub on loopback, faults included."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hub_server
import numpy as np
import pytest
from hub_server import HubServer, Repository

from data import prepare

ROOT = Path(__file__).resolve().parent.parent
NAME = "someone/golf"
FOLDER = "datasets/datasets/fineweb10B_sp1024"
VAL_TEXTS = [
    "one small document",
    "zwei \u00e4hnliche Dokumente",
    "a \ufffd inside",
    " leading space",
]


def shard(tokens: list[int] | np.ndarray) -> bytes:
    """Return a shard's bytes, written out by hand."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes()


@pytest.fixture(scope="module")
def model() -> bytes:
    """A tokenizer of 1,024 pieces."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), size=rng.integers(2, 9))) for _ in range(3000)]
    return prepare.train_tokenizer([" ".join(words)], 1024, 0)


@pytest.fixture
def repository(model: bytes, tmp_path: Path) -> Repository:
    """Three training shards, one validation shard, tokenizer and manifest, as published."""
    (tmp_path / "published.model").write_bytes(model)
    tokenizer = prepare.load_tokenizer(tmp_path / "published.model")
    val = np.concatenate(tokenizer.encode(VAL_TEXTS))
    files = {f"{FOLDER}/fineweb_val_000000.bin": shard(val)}
    for number in range(3):
        tokens = np.random.default_rng(number).integers(4, 1024, size=30_000)
        tokens[0] = 1
        files[f"{FOLDER}/fineweb_train_{number:06d}.bin"] = shard(tokens)
    entry = {"name": "fineweb10B_sp1024", "tokenizer_name": "sp_bpe_1024"}
    paths = {f"{k}_path": f"tokenizers/fineweb_1024_bpe.{k}" for k in ("model", "vocab")}
    manifest = {
        "datasets": [{**entry, "stats": {"files_train": 3, "files_val": 1}}],
        "tokenizers": [{"name": "sp_bpe_1024", **paths}],
    }
    files["datasets/manifest.json"] = json.dumps(manifest).encode()
    files["datasets/tokenizers/fineweb_1024_bpe.model"] = model
    return Repository(NAME, files)


class Download:
    """Runs `prepare.py fineweb` into a folder, against an endpoint."""

    def __init__(self, out: Path, endpoint: str, monkeypatch, capsys) -> None:
        self.out, self.monkeypatch, self.capsys = out, monkeypatch, capsys
        self.folder = out / "datasets" / "fineweb10B_sp1024"
        self.environment = {
            "HF_ENDPOINT": endpoint,
            "MATCHED_FINEWEB_REPO_ID": NAME,
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def argv(self, *more: str, shards: int = 2) -> list[str]:
        """Return the command line."""
        options = ["--train-shards", str(shards), "--out", str(self.out)]
        return ["fineweb", "--variant", "sp1024", *options, *more]

    def __call__(self, *more: str, shards: int = 2, **environment: str) -> tuple[int, str, str]:
        """Run it in this process; return exit status, stdout and stderr."""
        self.capsys.readouterr()
        with self.monkeypatch.context() as patch:
            for name, value in {**self.environment, **environment}.items():
                patch.setenv(name, value)
            # The real pauses are for real networks.
            patch.setattr(prepare.hub, "RETRY_PAUSES", (0.01, 0.01))
            status = prepare.main(self.argv(*more, shards=shards))
        return status, *self.capsys.readouterr()

    def start(self, **environment: str) -> subprocess.Popen:
        """Start it as a process of its own."""
        return subprocess.Popen(
            [sys.executable, ROOT / "data" / "prepare.py", *self.argv()],
            env={**os.environ, **self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **environment: str) -> tuple[int, str, str]:
        """Run it as a process of its own; return exit status, stdout and stderr."""
        process = self.start(**environment)
        stdout, stderr = process.communicate(timeout=100)
        return process.returncode, stdout, stderr

    def shards(self) -> dict[str, bytes]:
        """Return the published files that are in place."""
        found = self.folder.glob("fineweb_*.bin")
        return {f"{FOLDER}/{path.name}": path.read_bytes() for path in found}

    def sidecar(self) -> dict | None:
        return prepare.read_json(self.folder / prepare.SIDECAR)


@pytest.fixture
def hub(repository: Repository):
    """The server."""
    with HubServer(repository) as server:
        yield server


@pytest.fixture
def download(hub: HubServer, tmp_path: Path, monkeypatch, capsys) -> Download:
    """A download of the repository into an empty folder."""
    return Download(tmp_path / "out", hub.endpoint, monkeypatch, capsys)


def assert_one_error(outcome: tuple[int, str, str], status: int, *words: str) -> None:
    """Check exit status and that stderr is one line with all `words`."""
    code, _, stderr = outcome
    assert code == status, outcome
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    for word in words:
        assert word in stderr


def test_everything_arrives_and_is_counted(repository, download):
    code, stdout, stderr = download.run()
    assert (code, stderr) == (0, "")
    expected = {k: v for k, v in repository.files.items() if k.endswith(".bin")}
    del expected[f"{FOLDER}/fineweb_train_000002.bin"]
    assert download.shards() == expected
    model = repository.files["datasets/tokenizers/fineweb_1024_bpe.model"]
    assert (download.out / "tokenizers/fineweb_1024_bpe.model").read_bytes() == model

    sidecar = download.sidecar()
    assert list(sidecar) == prepare_keys()
    assert sidecar["documents"] == len(VAL_TEXTS)
    assert sidecar["tokens"] == len(expected[f"{FOLDER}/fineweb_val_000000.bin"][1024:]) // 2
    assert sidecar["raw_bytes"] is None and sidecar["shared_documents"] is None
    assert sidecar["encoded_bytes"] == sum(len(text.encode()) for text in VAL_TEXTS)
    assert sidecar["train"] == {"documents": None, "tokens": None}
    assert sidecar["builder"]["repository"] == NAME
    assert "tokens:60,000" in stdout and f"documents:{len(VAL_TEXTS)}" in stdout
    assert not (download.folder / ".download").exists()

    # A second run needs no network; more shards only fetch what is new.
    asked = len(repository.log)
    assert "nothing to do" in download(HF_ENDPOINT="http://127.0.0.1:9")[1]
    assert len(repository.log) == asked
    assert download(shards=3)[0] == 0
    assert repository.downloads(f"{FOLDER}/fineweb_train_000002.bin") == 1
    assert repository.downloads(f"{FOLDER}/fineweb_train_000000.bin") == 1
    assert download.sidecar() == sidecar


def prepare_keys() -> list[str]:
    """The sidecar's keys."""
    keys = "format dataset documents tokens raw_bytes encoded_bytes val_shards tokenizer split"
    return [*keys.split(), "shared_documents", "train", "builder"]


@pytest.mark.parametrize(
    "faults", [["cut"], ["cut", "cut"], ["500"], ["short"], ["500", "cut"], ["head500"]], ids=str
)
def test_passing_faults_are_overcome(repository, download, faults):
    path = f"{FOLDER}/fineweb_train_000001.bin"
    repository.faults[path] = faults
    code, _, stderr = download()
    assert (code, stderr) == (0, "")
    assert download.shards()[path] == repository.files[path]


@pytest.mark.parametrize(
    ("fault", "words"),
    [("short", ("fewer bytes", "train_000001")), ("500", ("500",)), ("head500", ("500",))],
)
def test_lasting_faults_are_one_line_and_lose_nothing(repository, download, fault, words):
    path = f"{FOLDER}/fineweb_train_000001.bin"
    repository.faults[path] = [fault] * 50
    assert_one_error(download(), 1, *words, "again")
    assert sorted(Path(name).name for name in download.shards()) == [
        "fineweb_train_000000.bin",
        "fineweb_val_000000.bin",
    ]
    assert download.sidecar() is None
    repository.faults.clear()
    assert download()[0] == 0
    assert repository.downloads(f"{FOLDER}/fineweb_train_000000.bin") == 1


def test_wrong_header_is_refused(repository, download):
    path = f"{FOLDER}/fineweb_train_000001.bin"
    content = bytearray(repository.files[path])
    content[0] ^= 1
    repository.files[path] = bytes(content)
    assert_one_error(download(), 2, "fineweb_train_000001.bin", "magic")
    assert path not in download.shards()


def test_header_that_promises_more_is_refused(repository, download):
    path = f"{FOLDER}/fineweb_val_000000.bin"
    repository.files[path] = repository.files[path][:-2]
    assert_one_error(download(), 2, "fineweb_val_000000.bin", "promises")
    assert not download.shards()


def test_token_beyond_the_vocabulary_is_refused(repository, download):
    repository.files[f"{FOLDER}/fineweb_val_000000.bin"] = shard([1, 5, 1024])
    assert_one_error(download(), 2, "1024 pieces")
    assert download.sidecar() is None


def test_too_many_shards(repository, download):
    assert_one_error(download(shards=4), 2, "--train-shards 4", "publishes 3")
    assert not download.shards()


def test_missing_repository(download):
    outcome = download(MATCHED_FINEWEB_REPO_ID="nobody/nothing")
    assert_one_error(outcome, 2, "nobody/nothing", "MATCHED_FINEWEB_REPO_ID")
    assert not download.folder.exists()


def test_missing_shard(repository, download):
    del repository.files[f"{FOLDER}/fineweb_train_000001.bin"]
    assert_one_error(download(), 2, "publishes 1")


def test_offline(download):
    assert_one_error(download(HF_ENDPOINT="http://127.0.0.1:9"), 1, "cannot reach", "offline")
    assert_one_error(download.run(HF_HUB_OFFLINE="1"), 1, "HF_HUB_OFFLINE")
    assert not download.folder.exists()


def test_not_a_hub(download):
    class Portal(SimpleHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Portal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    outcome = download(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    assert_one_error(outcome, 1, "does not answer like a Hugging Face hub")


@pytest.mark.parametrize(
    "manifest",
    [
        b"not json",
        b"[]",
        b"{}",
        b'{"datasets": [], "tokenizers": []}',
        b'{"datasets": [{"name": "fineweb10B_sp1024", "stats": {}}], "tokenizers": []}',
        b'{"datasets": [{"name": "fineweb10B_sp1024", "tokenizer_name": "t", "stats": '
        b'{"files_train": 3, "files_val": 1}}], "tokenizers": '
        b'[{"name": "t", "path": "../x.model"}]}',
    ],
    ids=range(6),
)
def test_bad_manifest(repository, download, manifest):
    repository.files["datasets/manifest.json"] = manifest
    assert_one_error(download(), 2, "manifest.json", "--skip-manifest")


def test_without_manifest(repository, download):
    del repository.files["datasets/manifest.json"]
    assert_one_error(download(), 2, "does not publish datasets/manifest.json")
    assert download("--skip-manifest")[0] == 0
    assert len(download.shards()) == 3
    assert_one_error(download("--skip-manifest", shards=9), 2, "publishes 3")
    assert download.sidecar()["documents"] == len(VAL_TEXTS)


def test_root_prefix(repository, download):
    repository.files = {k.removeprefix("datasets/"): v for k, v in repository.files.items()}
    assert download(MATCHED_FINEWEB_REMOTE_ROOT_PREFIX="")[0] == 0


def test_files_of_two_repositories_are_not_mixed(repository, download):
    path = f"{FOLDER}/fineweb_train_000001.bin"
    repository.faults[path] = ["500"] * 50
    assert download()[0] == 1
    outcome = download(MATCHED_FINEWEB_REPO_ID="other/golf")
    assert_one_error(outcome, 2, NAME, "other/golf")


def test_a_finished_download_of_another_repository_is_not_taken_for_it(repository, download):
    assert download()[0] == 0
    outcome = download(MATCHED_FINEWEB_REPO_ID="other/golf")
    assert_one_error(outcome, 2, NAME, "other/golf")


def test_shards_of_two_revisions_are_not_mixed(repository, download, monkeypatch):
    """The repository moved on between an interrupted download and the next run."""
    path = f"{FOLDER}/fineweb_train_000001.bin"
    repository.faults[path] = ["500"] * 50
    assert download()[0] == 1
    before, repository.faults = download.shards(), {}
    assert before
    monkeypatch.setattr(hub_server, "COMMIT", "f" * 40)
    assert_one_error(download(), 2, NAME, "revision 0123456789ab")
    assert download.shards() == before
    monkeypatch.undo()
    assert download()[0] == 0


def test_a_record_that_names_other_files_deletes_none_of_them(repository, download, tmp_path):
    assert download()[0] == 0
    other, sidecar = tmp_path / "thesis.txt", download.sidecar()
    other.write_text("mine")
    for recorded in ({str(other): "0"}, {"../../thesis.txt": "0"}, ["fineweb_val_000000.bin"]):
        prepare.write_json(download.folder / prepare.SIDECAR, {**sidecar, "val_shards": recorded})
        assert_one_error(download(), 2, str(download.folder))
        assert other.read_text() == "mine"
    (download.folder / prepare.SIDECAR).unlink()
    assert download()[0] == 0
    assert download.sidecar() == sidecar


def test_damaged_files_are_named_or_fetched_again(repository, download):
    """A shard that was cut short is fetched; one with other bytes is the user's to delete."""
    assert download()[0] == 0
    sidecar = download.sidecar()
    train, val = (download.folder / f"fineweb_{n}.bin" for n in ("train_000001", "val_000000"))
    train.write_bytes(train.read_bytes()[:-2])
    changed = val.read_bytes()[:-2] + b"\x05\x00"
    val.write_bytes(changed)
    for _ in range(2):
        assert_one_error(download(), 2, str(val), "delete that file")
        assert val.read_bytes() == changed
    val.unlink()
    assert download()[0] == 0
    assert download.sidecar() == sidecar
    assert all(download.shards()[k] == repository.files[k] for k in download.shards())


DIRECT = {"NO_PROXY": "", "no_proxy": ""}


@pytest.mark.parametrize(
    ("environment", "status", "word"),
    [
        ({"ALL_PROXY": "socks5://127.0.0.1:9", **DIRECT}, 1, "pip install socksio"),
        ({"HTTP_PROXY": "ftp://127.0.0.1:9", **DIRECT}, 1, "HTTP_PROXY=ftp"),
        ({"HF_ENDPOINT": "ftp://127.0.0.1:9"}, 2, "HF_ENDPOINT=ftp://127.0.0.1:9"),
        ({"HF_ENDPOINT": "127.0.0.1:9"}, 2, "HF_ENDPOINT=127.0.0.1:9"),
        ({"HF_ENDPOINT": "http://["}, 2, "HF_ENDPOINT=http://["),
        ({"HF_ENDPOINT": ""}, 2, "HF_ENDPOINT="),
    ],
    ids=["socks", "proxy", "scheme", "no scheme", "address", "empty"],
)
def test_faults_that_do_not_pass_end_at_once(download, environment, status, word):
    """A package that is missing, or an address that is none: nothing is tried again."""
    if "socksio" in word and importlib.util.find_spec("socksio"):
        pytest.skip("socksio is here, so the proxy would be asked")
    began = time.monotonic()
    outcome = download.run(**environment)
    assert_one_error(outcome, status, word)
    assert "again" not in outcome[2] and time.monotonic() - began < sum(prepare.hub.RETRY_PAUSES)


def test_a_fault_of_the_program_is_not_tried_again(download, monkeypatch):
    import huggingface_hub

    calls = []

    def broken(url):
        calls.append(url)
        raise TypeError("no such argument")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", broken)
    assert_one_error(download(), 1, "TypeError: no such argument", "would not help")
    assert len(calls) == 1


def test_bytes_with_another_sha256_are_not_kept(repository, download, monkeypatch):
    monkeypatch.setattr(prepare.hub, "file_sha256", lambda path: "0")
    assert_one_error(download(), 1, "published sha256", "again")
    assert not download.shards()


def test_killed_in_the_middle_of_a_file(repository, download):
    """SIGKILL while each kind of file is on its way; the next run ends with the same bytes."""
    names = ["datasets/tokenizers/fineweb_1024_bpe.model"]
    names += [f"{FOLDER}/fineweb_{part}.bin" for part in ("val_000000", "train_000001")]
    for path in names:
        repository.faults[path] = ["hang"]
        process = download.start()
        wait_for(lambda path=path: repository.downloads(path))
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert all(repository.files[k] == v for k, v in download.shards().items())
        assert download.sidecar() is None
    assert download()[0] == 0
    assert len(download.shards()) == 3
    assert repository.downloads(f"{FOLDER}/fineweb_train_000000.bin") == 1
    hidden = [p.name for p in download.folder.iterdir() if p.name.startswith(".")]
    assert hidden == [".build.json"]


def test_interrupted_with_ctrl_c(repository, download):
    path = f"{FOLDER}/fineweb_train_000000.bin"
    repository.faults[path] = ["hang"]
    process = download.start()
    wait_for(lambda: repository.downloads(path))
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert_one_error((process.returncode, stdout, stderr), 130, "interrupted", "again")
    assert not (download.folder / ".download").exists()


def wait_for(condition) -> None:
    """Return when a condition holds; fail after a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_disk_full(repository, download, monkeypatch, tmp_path):
    class Usage:
        free = 10

    monkeypatch.setattr(prepare.hub.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(prepare.Failure, match="disk full"):
        prepare.hub.require_space(tmp_path, 11)
    prepare.hub.require_space(tmp_path, 10)


def test_space_is_asked_for_missing_shards_only(repository, download, monkeypatch):
    assert download(shards=3)[0] == 0
    first = download.folder / "fineweb_train_000000.bin"
    size = first.stat().st_size
    first.unlink()
    asked = []
    monkeypatch.setattr(prepare.hub, "require_space", lambda folder, size: asked.append(size))
    assert download(shards=3)[0] == 0
    assert max(asked) == size
    assert first.stat().st_size == size


def test_bytes_are_counted_exactly(model, tmp_path):
    """Whatever the tokens: bytes that are no UTF-8, silent pieces, spaces at the start."""
    (tmp_path / "m.model").write_bytes(model)
    tokenizer = prepare.load_tokenizer(tmp_path / "m.model")
    rng = np.random.default_rng(1)
    for size in (0, 1, 2, 5, 50, 2000):
        for low, high in ((0, 1024), (4, 260), (260, 1024)):
            ids = np.array([1, *rng.integers(low, high, size=size)], dtype=np.uint16)
            assert tokenizer.decoded_bytes(ids) == tokenizer.counted_bytes(ids)
