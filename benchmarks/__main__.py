"""`python -m benchmarks [--quick] [subject …]`: measure, print a table, and keep it in benchmarks/results."""

import argparse
import sys

import jax

from benchmarks import cross_entropy, linear
from benchmarks.harness import save, table

SUBJECTS = {"cross_entropy": cross_entropy, "linear": linear}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("subjects", nargs="*", choices=[*SUBJECTS, []], help="all, if none is named")
    parser.add_argument("--quick", action="store_true", help="the first shape of each subject, fewer turns")
    parser.add_argument("--no-save", action="store_true", help="print only")
    arguments = parser.parse_args()

    def progress(text: str) -> None:
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    rows = []
    for name in arguments.subjects or SUBJECTS:
        rows += SUBJECTS[name].run(arguments.quick, progress)
    progress("")
    print(table(rows))
    if not arguments.no_save:
        path = save(rows, f"{jax.default_backend()}-jax{jax.__version__}")
        print(f"\nsaved in benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
