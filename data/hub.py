"""Download published shards from a Hugging Face hub, through huggingface_hub.

huggingface_hub resumes a broken transfer and checks its size; here is what it leaves open: which
files belong together, when another attempt can help, and that a file takes its name only when it
is whole.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shards import (
    BadInput,
    Failure,
    file_sha256,
    is_whole,
    progress_bar,
    read_shard_header,
    say,
    shard_path,
    shard_paths,
)
from tqdm import tqdm

# Seconds between the attempts at one file, on top of huggingface_hub's own within an attempt.
RETRY_PAUSES = (1, 2, 4, 8)
# Faults of the network that may pass, as the HTTP libraries name their classes.
PASSING_ERRORS = {"NetworkError", "TimeoutException", "RemoteProtocolError", "ConnectionError"}
PASSING_STATUS = {408, 429, 500, 502, 503, 504}
# What the published names of data sets and tokenizers with marked capitals end in.
CASEOPS_ENDING = "_lossless_caps_caseops_v1_reserved"


class NotPublished(BadInput):
    """The repository is there but has no such file."""


@dataclass(frozen=True)
class Published:
    """What a repository offers for a variant; None where no manifest says so.

    `tokenizer` is the model's path below the prefix.
    """

    tokenizer: str
    train_shards: int | None = None
    val_shards: int | None = None


class Hub:
    """Files of one revision of a data set repository.

    The revision is that of the first file asked about, so all files belong together. `staging`
    is on the disk of the final place, and nothing goes through the shared cache: a second copy
    of 16 GB would be in the way.
    """

    def __init__(self, repository: str, prefix: str, staging: Path, revision: str) -> None:
        refuse_bad_address(hub_address())
        # The cache of hf_xet would be a second copy too.
        os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")
        import huggingface_hub

        huggingface_hub.logging.set_verbosity_error()
        self.library = huggingface_hub
        self.repository = repository
        self.prefix = prefix.strip("/")
        self.staging = staging
        self.revision = revision

    def remote(self, path: str) -> str:
        """Return the path inside the repository."""
        return f"{self.prefix}/{path}" if self.prefix else path

    def place(self) -> dict:
        """Return what every request says: where the repository is, and its revision."""
        return {"repo_type": "dataset", "revision": self.revision, "endpoint": hub_address()}

    def facts(self, path: str):
        """Return size and etag of a file (huggingface_hub's HfFileMetadata)."""

        def ask():
            url = self.library.hf_hub_url(self.repository, self.remote(path), **self.place())
            return self.library.get_hf_file_metadata(url)

        facts = self._attempt(path, ask)
        if not facts.commit_hash:
            raise Failure(f"{hub_address()} does not answer like a Hugging Face hub (HF_ENDPOINT)")
        self.revision = facts.commit_hash
        return facts

    def fetch(self, path: str, tick: Callable[[float], object] = lambda size: None) -> Path:
        """Download a file into the staging folder, whole, and return where it is.

        `tick` is told of bytes as they arrive. Raises NotPublished, BadInput or Failure.
        """
        facts = self.facts(path)
        self.staging.mkdir(parents=True, exist_ok=True)
        require_space(self.staging, facts.size or 0)

        class Ticker(tqdm):
            """A silent bar that passes on what huggingface_hub reports."""

            def __init__(self, *args, **kwargs) -> None:
                # hf_xet reports twice: bytes received, and written as a bar one position below.
                self.counts = not kwargs.get("position")
                super().__init__(*args, **{**kwargs, "disable": True})

            def update(self, n: float | None = 1) -> None:
                if self.counts:
                    tick(n or 0)

        def download() -> Path:
            name = self.remote(path)
            place = self.library.hf_hub_download(
                self.repository, name, local_dir=self.staging, tqdm_class=Ticker, **self.place()
            )
            # huggingface_hub compares sizes; of large files the hub states the sha256, too.
            stated = facts.etag or ""
            if re.fullmatch("[0-9a-f]{64}", stated) and file_sha256(Path(place)) != stated:
                Path(place).unlink()
                raise ConnectionError("the bytes that arrived do not have the published sha256")
            return Path(place)

        return self._attempt(path, download)

    def _attempt(self, path: str, call: Callable):
        """Call again after a fault that may pass; raise at once where no other try can help."""
        for pause in (*RETRY_PAUSES, None):
            try:
                return call()
            except (Failure, BadInput):
                raise
            except Exception as error:
                not_found = isinstance(error, self.library.errors.LocalEntryNotFoundError)
                if not_found and isinstance(error.__cause__, Exception):
                    error = error.__cause__  # the wrapper only says that something happened
                self._raise_lasting(error, path)
                if pause is None:
                    said = passing_fault(error)
                    raise Failure(f"{path}: {said}; run the same command again") from None
                time.sleep(pause)

    def _raise_lasting(self, error: Exception, path: str) -> None:
        """Raise in words what no other attempt can mend; return for faults that may pass."""
        errors = self.library.errors
        if isinstance(error, errors.OfflineModeIsEnabled):
            raise Failure("HF_HUB_OFFLINE is set: FineWeb can only be downloaded online") from None
        if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
            gone = ""
            if self.revision != "main":
                gone = f", or its revision {self.revision[:12]}, which the folder has, is gone"
            raise BadInput(
                f"{self.repository}: no such data set repository, or not a public one{gone} "
                "(MATCHED_FINEWEB_REPO_ID chooses it)"
            ) from None
        status = status_of(error)
        if status == 404:
            raise NotPublished(f"{self.repository} does not publish {self.remote(path)}") from None
        if status is not None and status not in PASSING_STATUS:
            raise Failure(f"{path}: the hub answered {status}") from None
        if status is None and not may_pass(error):
            if isinstance(error, OSError) and error.errno is not None:
                raise error  # of the disk
            raise Failure(f"{path}: {lasting_fault(error)}") from None


def status_of(error: Exception) -> int | None:
    """Return the HTTP status that an error is about, if it is about one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def may_pass(error: Exception) -> bool:
    """Say whether another attempt may succeed: a fault of the network, not of what was asked."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & PASSING_ERRORS) or "Consistency check failed" in str(error)


def passing_fault(error: Exception) -> str:
    """Return in words a fault that did not pass."""
    if status := status_of(error):
        return f"the hub answered {status}, {len(RETRY_PAUSES) + 1} times"
    if type(error).__name__ in ("ConnectError", "ConnectTimeout"):
        return f"cannot reach {hub_address()}: offline, or a proxy is in the way"
    if "Consistency check failed" in str(error):
        return "fewer bytes arrived than the hub announced"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def lasting_fault(error: Exception) -> str:
    """Return in words a fault that no other attempt can mend, and what to do about it."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    about = said.lower()
    names = (name for name in sorted(os.environ) if name.lower().endswith("_proxy"))
    proxies = [f"{name}={os.environ[name]}" for name in names if name.lower() != "no_proxy"]
    through = f"the proxy {', '.join(proxies)}" if proxies else "a proxy"
    if isinstance(error, ImportError) and "socks" in about:
        return f"{through} needs a package ({said}): pip install socksio, or unset the variable"
    if isinstance(error, ImportError):
        return f"a package is missing ({said}): pip install -r requirements.txt"
    if "proxy" in about:
        return f"{through} cannot be used ({said}): correct or unset the variable"
    return f"{said}; trying again would not help, please report it"


def hub_address() -> str:
    """Return where the hub is: HF_ENDPOINT, or the public one."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def refuse_bad_address(address: str) -> None:
    """Raise BadInput where a hub's address cannot be one."""
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(address)
        if parts.scheme in ("http", "https") and parts.hostname:
            return
    raise BadInput(f"HF_ENDPOINT={address}: expected an address such as https://huggingface.co")


def require_space(folder: Path, size: int) -> None:
    """Raise Failure unless the disk of `folder` has room for `size` bytes."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise Failure(
            f"disk full: {folder} needs {size / 1e9:.2f} GB more and has {free / 1e9:.2f} GB; "
            "free some space and run the same command again"
        )


def published(hub: Hub, name: str, vocab_size: int, skip_manifest: bool) -> Published:
    """Return what the repository offers for a data set, by its manifest or by convention."""
    if skip_manifest:
        kind = CASEOPS_ENDING if name.endswith(CASEOPS_ENDING) else ""
        return Published(tokenizer=f"tokenizers/fineweb_{vocab_size}_bpe{kind}.model")
    try:
        path = hub.fetch("manifest.json")
    except NotPublished as error:
        raise BadInput(f"{error}; try --skip-manifest") from None
    try:
        return read_manifest(json.loads(path.read_bytes()), name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(
            f"{hub.repository}: manifest.json does not describe {name} "
            f"({type(error).__name__}: {error}); try --skip-manifest"
        ) from None


def read_manifest(manifest: dict, name: str) -> Published:
    """Return a manifest's entry of a data set; ValueError, KeyError or TypeError if it is bad."""
    known = {listed["name"]: listed for listed in manifest["datasets"]}
    if name not in known:
        raise ValueError(f"it lists {', '.join(sorted(known)) or 'nothing'}")
    described = known[name]
    numbers = [described["stats"][key] for key in ("files_train", "files_val")]
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        raise ValueError(f"{numbers} shards")
    tokenizers = {listed["name"]: listed for listed in manifest["tokenizers"]}
    tokenizer = tokenizers[described["tokenizer_name"]]
    paths = [tokenizer.get(key) for key in ("model_path", "path", "vocab_path")]
    models = [path for path in paths if path and path.endswith(".model")]
    if not models or ".." in Path(models[0]).parts:
        raise ValueError(f"no .model file for tokenizer {described['tokenizer_name']}")
    return Published(models[0], *numbers)


def fetch_shard(hub: Hub, folder: Path, split: str, number: int, remaining: int, bar: tqdm) -> None:
    """Download one shard, verify its header and give it its name.

    Does nothing for one that is there and whole. `remaining` shards, this one too, are missing.
    """
    path = shard_path(folder, split, number)
    if is_whole(path):
        return
    remote = f"datasets/{folder.name}/{path.name}"
    size = hub.facts(remote).size or 0
    before = bar.n
    bar.total = before + remaining * size
    require_space(folder, remaining * size)
    staged = hub.fetch(remote, bar.update)
    # Attempts that failed have been counted too.
    bar.update(before + size - bar.n)
    try:
        read_shard_header(staged)
    except BadInput as error:
        staged.unlink()
        why = str(error).replace(str(staged), remote)
        raise BadInput(f"{hub.repository}: {why}") from None
    # A shard with its name counts as whole, so its bytes have to be on the disk before.
    with staged.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(staged, path)


def fetch_shards(
    hub: Hub, folder: Path, offer: Published, train_shards: int, byte_shards: bool
) -> None:
    """Download all validation shards and the first `train_shards` training shards.

    `byte_shards`: the bytes of each token of every validation shard, too.
    """
    say(f"downloading {folder.name} from {hub.repository} at {hub.revision[:12]}")
    with progress_bar(0, "B", folder.name) as bar:
        for number in itertools.count():
            if number == offer.val_shards:
                break
            try:
                fetch_shard(hub, folder, "val", number, 1, bar)
            except NotPublished:
                if number == 0 or offer.val_shards is not None:
                    raise
                break
        if extra := shard_paths(folder, "val")[number:]:
            raise BadInput(f"{extra[0]}: {hub.repository} publishes only {number}; delete it")
        for number in range(len(shard_paths(folder, "val")) if byte_shards else 0):
            fetch_shard(hub, folder, "val_bytes", number, 1, bar)
        missing = [n for n in range(train_shards) if not is_whole(shard_path(folder, "train", n))]
        for done, number in enumerate(missing):
            try:
                fetch_shard(hub, folder, "train", number, len(missing) - done, bar)
            except NotPublished:
                raise too_many_shards(train_shards, hub, folder, number) from None


def too_many_shards(wanted: int, hub: Hub, folder: Path, number: int) -> BadInput:
    """Return the refusal of more training shards than there are."""
    return BadInput(
        f"--train-shards {wanted}: {hub.repository} publishes {number} for {folder.name}"
    )
