"""The built-in corpus: the docstrings of installed packages, read from their source files.

Nothing of the packages is imported. `collect_docs` gives the documents; what differs between
builds of one version of a package is left out, so they are the same on every machine.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import inspect
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from documents import Document, text_fault
from shards import Failure, progress_bar, say

PACKAGES = ("torch", "numpy", "sympy", "networkx", "mpmath")
# Written anew by every build of a package.
SKIPPED_FILES = {"version.py", "__config__.py"}
# Only in the wheels for Python below 3.12.
SKIPPED_FOLDERS = {"numpy/distutils"}
OLDEST_PYTHON = (3, 10)


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(name=name)
    return Path(next(iter(spec.submodule_search_locations)))


def module_files(package: str, folder: Path) -> list[tuple[str, Path]]:
    """Return (package/relative/path.py, file) for a package's modules, sorted by the former."""
    files = []
    for path in folder.rglob("*.py"):
        name = f"{package}/{path.relative_to(folder).as_posix()}"
        skipped = any(name.startswith(f"{part}/") for part in SKIPPED_FOLDERS)
        if path.name not in SKIPPED_FILES and not skipped:
            files.append((name, path))
    return sorted(files)


def module_docstrings(path: Path) -> list[str]:
    """Return the docstrings of a source file in source order, cleaned of indentation.

    A file that Python 3.10 cannot read has none, whichever Python this is; docstrings that could
    not be documents are left out.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes(), feature_version=OLDEST_PYTHON)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = []
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            if text and not text_fault(text):
                found.append(text)
        inner = (ast.stmt, ast.excepthandler, ast.match_case)
        stack.extend(n for n in reversed(list(ast.iter_child_nodes(node))) if isinstance(n, inner))
    return found


def start_worker() -> None:
    """Leave Ctrl-C to the parent and end when the parent is gone, even if it was killed."""
    import multiprocessing

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Syntax trees hold no cycles; looking for some took a quarter of the time.
    gc.disable()
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def map_files(paths: list[Path], workers: int) -> Iterator[list[str]]:
    """Yield module_docstrings of each path, in order, with `workers` processes."""
    if workers == 1:
        yield from map(module_docstrings, paths)
        return
    import concurrent.futures
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, start_worker) as pool:
        try:
            yield from pool.map(module_docstrings, paths, chunksize=8)
        except BaseException as error:
            # A pool that breaks while it starts another worker raises OSError without an errno.
            unnumbered = isinstance(error, OSError) and error.errno is None
            if unnumbered or isinstance(error, concurrent.futures.process.BrokenProcessPool):
                message = "a worker process was killed; run again with --workers 1"
                raise Failure(message) from None
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def collect_docs(folders: dict[str, Path], workers: int) -> list[Document]:
    """Return one document a module of the packages in `folders`, in order of their digests.

    A docstring that occurs again, in the order of packages and paths, is dropped.
    """
    files = [pair for package in folders for pair in module_files(package, folders[package])]
    say(f"reading the docstrings of {', '.join(folders)}: {len(files):,} files")
    seen: set[str] = set()
    by_digest = {}
    with progress_bar(len(files), "file", "docstrings") as bar:
        texts = map_files([path for _, path in files], workers)
        for (name, _), docstrings in zip(files, texts, strict=True):
            fresh = [text for text in dict.fromkeys(docstrings) if text not in seen]
            seen.update(fresh)
            if fresh:
                document = Document("\n\n".join(fresh), name)
                by_digest[document.digest] = document
            bar.update()
    return [by_digest[digest] for digest in sorted(by_digest)]
