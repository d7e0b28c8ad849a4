"""The tests under each Python with the oldest and the newest JAX, optax, Flax, Haiku and Equinox that are supported.

    make test-matrix PYTHON312=… PYTHON313=…

Each cell has an environment of its own in .venv-matrix, installed by uv: the oldest from tests/oldest.txt, the newest
from constraints.txt. It runs the tests of values, a folder at a time. What came out is kept in
benchmarks/results/matrix.json; what passed is not run again, unless that file is removed. `make lock` renews the pins.
"""

import argparse
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.progress import MofNCompleteColumn, Progress

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "matrix.json"
ENVIRONMENTS = ROOT / ".venv-matrix"
PINS = {"oldest": ROOT / "tests" / "oldest.txt", "newest": ROOT / "constraints.txt"}
LIBRARIES = ("jax", "jaxtyping", "optax", "flax", "dm-haiku", "equinox")
PARTS = [
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("_[a-z]*/")),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "contract").glob("test_*.py")),
    "tests/project/test_models.py",
]
for own_target in ("fuzz", "soak"):
    PARTS.remove(f"tests/contract/test_{own_target}.py")
COUNTS = ("passed", "failed", "skipped", "seconds")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def floors() -> dict[str, str]:
    """The oldest release of each library that pyproject.toml allows."""
    extras = project()["optional-dependencies"].values()
    needed = [*project()["dependencies"], *(need for extra in extras for need in extra)]
    found = {match[1]: match[2] for need in needed if (match := re.fullmatch(r"([\w-]+)>=([\d.]+)", need))}
    return {name: found[name] for name in LIBRARIES}


def lock(uv: Path) -> None:
    """Renew tests/oldest.txt: the floors, and beside them the newest that goes with them."""
    options = "--quiet --universal --python-version 3.11 --extra test --no-annotate --no-emit-index-url"
    files = f"--no-emit-find-links --upgrade --constraint - --output-file {PINS['oldest'].name} ../pyproject.toml"
    subprocess.run(
        [uv, "pip", "compile", "--custom-compile-command", "make lock", *options.split(), *files.split()],
        input="".join(f"{name}=={version}\n" for name, version in floors().items()),
        cwd=PINS["oldest"].parent,
        text=True,
        check=True,
    )


def environment(uv: Path, interpreter: str, name: str, pins: Path) -> Path:
    """The Python of a cell's environment, which is made if it isn't there or has other pins."""
    folder = ENVIRONMENTS / name
    python, stamp = folder / "bin" / "python", folder / "pins.txt"
    wanted = pins.read_text(encoding="utf-8")
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", interpreter, folder], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", python, "--constraint", pins]
        subprocess.run([*install, "--requirements", "pyproject.toml", "--extra", "test"], cwd=ROOT, check=True)
        stamp.write_text(wanted, encoding="utf-8")
    return python


def asked(python: str | Path, code: str) -> Any:
    """What a program prints as JSON under another Python."""
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, check=True, text=True).stdout)


def run(python: Path, part: str) -> dict[str, float]:
    """How many tests of a file or folder passed; what failed is printed."""
    report = ENVIRONMENTS / "report.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", part, "-q", "-m", "not exact and not slow", "-p", "no:cacheprovider"]
    ran = subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, capture_output=True, text=True)
    if ran.returncode not in (0, 5):  # 5: no test is left by the marks
        print(ran.stdout[-4000:], ran.stderr[-4000:], file=sys.stderr)
    if not report.exists():
        return dict(zip(COUNTS, (0, 1, 0, 0.0), strict=True))
    suite = ElementTree.parse(report).getroot()[0].attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    passed = int(suite["tests"]) - failed - skipped
    failed = max(failed, ran.returncode not in (0, 5))  # what pytest could not begin with is no test
    return dict(zip(COUNTS, (passed, failed, skipped, float(suite["time"])), strict=True))


def totals(cell: dict[str, Any]) -> Counter:
    return sum((Counter(part) for part in cell["parts"].values()), Counter())


def table(stored: dict[str, Any]) -> list[str]:
    """The lines of docs/supported-versions.md, of cells in which everything has run."""
    header = ["Python", *LIBRARIES, "passed", "failed", "skipped", "minutes"]
    rows = [header, ["---"] * len(header)]
    for name, cell in sorted(stored["cells"].items()):
        if set(cell["parts"]) == set(PARTS):
            total = totals(cell)
            counts = [str(total[count]) for count in COUNTS[:3]]
            rows.append([name.split("-")[0], *cell["versions"].values(), *counts, f"{total['seconds'] / 60:.0f}"])
    return [f"| {' | '.join(row)} |" for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("uv", type=Path)
    parser.add_argument("interpreters", nargs="*", help="one for each Python; none to renew the pins")
    parser.add_argument("--only", choices=PINS, help="default: both")
    wanted = parser.parse_args()
    ages = [wanted.only] if wanted.only else list(PINS)
    if not wanted.interpreters:
        return lock(wanted.uv)
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"cells": {}}
    versions = (
        f"import json; from importlib.metadata import version as v; print(json.dumps({{n: v(n) for n in {LIBRARIES}}}))"
    )
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        task = progress.add_task("", total=len(wanted.interpreters) * len(ages) * len(PARTS))
        for interpreter in wanted.interpreters:
            number = asked(interpreter, "import sys; print('\"%d.%d\"' % sys.version_info[:2])")
            for age in ages:
                name = f"{number}-{age}"
                progress.update(task, description=f"{name} environment")
                python = environment(wanted.uv, interpreter, name, PINS[age])
                cell = stored["cells"].setdefault(name, {"versions": asked(python, versions), "parts": {}})
                for part in PARTS:
                    progress.update(task, description=f"{name} {part}")
                    if cell["parts"].get(part, {"failed": 1})["failed"]:
                        cell["parts"][part] = run(python, part)
                        RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
                    progress.advance(task)
    print("\n".join(table(stored)))
    sys.exit(any(totals(cell)["failed"] for cell in stored["cells"].values()))


if __name__ == "__main__":
    main()
