"""Two commands in turn, A B A B, and the ratio of a number they print, pair by pair.

    python benchmarks/compare.py "CMD A" "CMD B" [--pairs 3] [--key ms.step]

Each command's last line of output is one JSON object, as that of the other scripts here; the key
is a path of names in it, joined by dots. A ratio above 1 says that B's number is the smaller.
"""

import argparse
import json
import shlex
import statistics
import subprocess


def number(command: str, key: str) -> float:
    """Run a command and read the number; its failure ends the comparison."""
    done = subprocess.run(shlex.split(command), check=True, stdout=subprocess.PIPE, text=True)
    value = json.loads(done.stdout.splitlines()[-1])
    for name in key.split("."):
        value = value[name]
    return float(value)


def main() -> None:
    """Run the pairs; print each, the median ratio, and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--key", default="ms.step")
    given = parser.parse_args()
    ratios = []
    for pair in range(given.pairs):
        a, b = number(given.a, given.key), number(given.b, given.key)
        ratios.append(a / b)
        print(f"pair {pair + 1}: A {a:.2f}  B {b:.2f}  A/B {a / b:.3f}", flush=True)
    print(f"median A/B {statistics.median(ratios):.3f} of {given.key}")
    print(json.dumps({"key": given.key, "ratios": ratios, "median": statistics.median(ratios)}))


if __name__ == "__main__":
    main()
