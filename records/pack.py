"""Pack train_gpt.py into a smaller file that runs, and read such a file without running it.

    python records/pack.py train_gpt.py packed/train_gpt.py     write the packed form
    python records/pack.py --text packed/train_gpt.py           print the text inside

A packed file is the whole text, bzip2 in base 85, behind four lines that run it. It is the file
that runs, so its own size is the code of the artifact it makes, and it is what a run folder keeps.
--plan needs plan.py beside it, as the plain file does.
"""

from __future__ import annotations

import argparse
import ast
import base64
import bz2
import re
import sys
from pathlib import Path

from reading import end_quietly

MAX_TEXT_BYTES = 1 << 22
# What runs is the payload and nothing else. linecache is told the text, so that logged tracebacks
# and whatever compiles functions from their source find the lines they ask for.
STUB = '''"""Packed text: `python records/pack.py --text FILE` prints it; so does FILE --text."""
import base64, bz2, linecache, sys
text = bz2.decompress(base64.b85decode(b"{payload}")).decode()
if sys.argv[1:] == ["--text"]: sys.exit(print(end=text))
name = __file__ + " (text)"
linecache.cache[name] = len(text), None, text.splitlines(True), name
exec(compile(text, name, "exec", dont_inherit=True))
'''
HEAD, TAIL = (part.encode() for part in STUB.split("{payload}"))
PAYLOAD = re.compile(rb"[0-9A-Za-z!#$%&()*+;<=>?@^_`{|}~-]+")  # base 85: none of it ends a string


def pack(text: bytes) -> bytes:
    """A Python file that runs as `text` does; the same text always gives the same bytes."""
    if not 0 < len(text) <= MAX_TEXT_BYTES:
        raise ValueError(f"{len(text):,} bytes of text, expected 1 to {MAX_TEXT_BYTES:,}")
    ast.parse(text)
    return HEAD + base64.b85encode(bz2.compress(text, 9)) + TAIL


def is_packed(script: bytes) -> bool:
    """Whether a script is pack()'s to the letter: its stub around one payload."""
    return (
        script.startswith(HEAD)
        and script.endswith(TAIL)
        and PAYLOAD.fullmatch(script[len(HEAD) : -len(TAIL)]) is not None
    )


def text_of(script: bytes) -> bytes:
    """The text of a packed script, never run; any other script as it is. Raises ValueError."""
    if not is_packed(script):
        return script
    reader = bz2.BZ2Decompressor()
    try:
        packed = base64.b85decode(script[len(HEAD) : -len(TAIL)])
        text = reader.decompress(packed, max_length=MAX_TEXT_BYTES + 1)
    except (EOFError, OSError, ValueError) as error:
        raise ValueError(f"the packed script's payload is damaged ({error})") from None
    if not reader.eof or reader.unused_data or len(text) > MAX_TEXT_BYTES:
        raise ValueError(
            f"the packed script's payload is cut short, or more than one text of at "
            f"most {MAX_TEXT_BYTES:,} bytes"
        )
    return text


def main(arguments: list[str]) -> int:
    """Do what the command line asks; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", action="store_true", help="print what the packed SCRIPT holds")
    parser.add_argument("script", type=Path)
    parser.add_argument("packed", type=Path, nargs="?", help="file to write")
    args = parser.parse_args(arguments)
    try:
        script = args.script.read_bytes()
        if args.text:
            if not is_packed(script):
                raise ValueError(f"{args.script}: not packed by records/pack.py")
            sys.stdout.buffer.write(text_of(script))
            return 0
        if args.packed is None or is_packed(script):
            raise ValueError("expected a readable SCRIPT and a file to write its packed form to")
        if args.packed.exists():
            raise ValueError(f"{args.packed} exists already; nothing in it was touched")
        packed = pack(script)
        args.packed.parent.mkdir(parents=True, exist_ok=True)
        args.packed.write_bytes(packed)
        print(f"{args.packed}: {len(packed):,} bytes for the {len(script):,} of {args.script}")
        return 0
    except (OSError, SyntaxError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    end_quietly()
    sys.exit(main(sys.argv[1:]))
