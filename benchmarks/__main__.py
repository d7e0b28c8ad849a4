"""`python -m benchmarks [--quick] [subject …]`: measure, print tables, keep and draw them in benchmarks/results."""

import argparse
import sys

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import activations, attention, cross_entropy, gpu, growth, linear, skipping, small
from benchmarks.figures import draw
from benchmarks.harness import RESULTS, load, results_name, save, table
from benchmarks.peers import absent

SUBJECTS = {
    "cross_entropy": cross_entropy,
    "linear": linear,
    "skipping": skipping,
    "activations": activations,
    "attention": attention,
    "small": small,
    "growth": growth,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("subjects", nargs="*", choices=[*SUBJECTS, "gpu", []], help="all but gpu, if none is named")
    parser.add_argument(
        "--quick", action="store_true", help="the first shape of each subject, fewer turns; keeps nothing"
    )
    arguments = parser.parse_args()
    if "gpu" in arguments.subjects:
        sys.exit(gpu.main(arguments.quick))
    names = arguments.subjects or list(SUBJECTS)
    rows = []
    done, doing = TextColumn("{task.completed}/{task.total}"), TextColumn("{task.description}")
    with Progress(BarColumn(), done, TimeElapsedColumn(), doing, transient=True) as bar:
        task = bar.add_task("", total=len(names))
        for name in names:
            measured = SUBJECTS[name].run(arguments.quick, lambda text: bar.update(task, description=text))
            rows += measured
            if not arguments.quick:
                save(measured, results_name(), absent())
            bar.advance(task)
    print(table(rows))
    if absent():
        print(f"\nnot installed here, and so without a column: {', '.join(absent())}")
    if not arguments.quick:
        path = RESULTS / f"{results_name()}.json"
        draw(load(path.stem), path)
        print(f"\nsaved in benchmarks/results/{path.name}, drawn beside it")


if __name__ == "__main__":
    main()
