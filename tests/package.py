"""The package as others get it: built twice, installed where nothing else is, imported, typed, verified.

    make check-package

Both times the tracked files are copied to a new place, with other times and permissions; wheel and sdist must be the
same to the last bit. The rest happens in an environment that holds the wheel and what it asks for alone.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rich.progress import Progress

ROOT = Path(__file__).parent.parent
MOST_SECONDS = 0.3  # of an import beside JAX's own
IMPORTS = 9
STEPS = 6


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def build(uv: str, folder: Path, mode: int, time: int) -> dict[str, Path]:
    """Wheel and sdist of a copy of the tracked files, by their names."""
    source, out = folder / "source", folder / "dist"
    for name in tracked():
        copy = source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy)
        copy.chmod(mode)
        os.utime(copy, (time, time))
    constraints = ["--build-constraints", ROOT / "constraints.txt"]
    subprocess.run([uv, "build", "--quiet", *constraints, "--out-dir", out, source], check=True, env=environment())
    return {path.name: path for path in sorted(out.iterdir()) if path.suffix in (".whl", ".gz")}


def environment(**more: str) -> dict[str, str]:
    """Built as of the last commit, and without the paths of this checkout."""
    command = ["git", "log", "-1", "--format=%ct"]
    date = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.strip()
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_CONSTRAINT")}
    return kept | {"SOURCE_DATE_EPOCH": date, **more}


def digests(built: dict[str, Path]) -> dict[str, str]:
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in built.items()}


def contents(wheel: Path) -> set[str]:
    """The folders at the top of a wheel."""
    with zipfile.ZipFile(wheel) as opened:
        return {name.split("/")[0] for name in opened.namelist()}


def importing(python: Path | str, folder: Path | str, **variables: str) -> dict:
    """What tests/importing.py finds."""
    command = [python, ROOT / "tests" / "importing.py"]
    variables = environment(JAX_PLATFORMS="nowhere", **variables)
    ran = subprocess.run(command, cwd=folder, capture_output=True, check=True, text=True, env=variables)
    return json.loads(ran.stdout)


def strictly_typed(python: Path, folder: Path) -> None:
    shutil.copyfile(ROOT / "tests" / "consumer.py", folder / "consumer.py")
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict", "include": ["consumer.py"]}\n')
    pyright = Path(sys.executable).with_name("pyright")
    subprocess.run([pyright, "--pythonpath", python], cwd=folder, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("uv")
    uv = parser.parse_args().uv
    with tempfile.TemporaryDirectory() as name, Progress() as progress:
        folder, said = Path(name), progress.console.print
        task = progress.add_task("", total=STEPS)

        def step(text: str) -> None:
            progress.update(task, description=text, advance=0 if text.startswith("building") else 1)

        step("building twice")
        built = build(uv, folder / "first", 0o644, 1_000_000_000)
        again = build(uv, folder / "second", 0o600, 1_500_000_000)
        assert len(built) == 2, list(built)
        assert digests(built) == digests(again), "two builds differ"
        (wheel,) = (path for path in built.values() if path.suffix == ".whl")
        version = wheel.name.split("-")[1]
        assert contents(wheel) == {"jsoftmax", f"jsoftmax-{version}.dist-info"}, contents(wheel)
        for name, digest in digests(built).items():
            said(f"{name} sha256 {digest}")

        step("installing the wheel")
        empty, python = folder / "empty", folder / "environment" / "bin" / "python"
        empty.mkdir()
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, python.parents[1]], check=True)
        pinned = ["--constraint", ROOT / "constraints.txt"]
        subprocess.run([uv, "pip", "install", "--quiet", "--python", python, *pinned, wheel], check=True)

        step("importing")
        found = [importing(python, empty) for _ in range(IMPORTS)]
        assert all(Path(one["file"]).is_relative_to(python.parents[1].resolve()) for one in found), found[0]["file"]
        assert all(one["changed"] == [] and not one["found_device"] for one in found), found
        seconds = statistics.median(one["seconds"] for one in found[1:])
        said(f"importing takes {seconds:.2f} s beside JAX, initializes no device and changes no setting")
        assert seconds <= MOST_SECONDS, f"more than {MOST_SECONDS} s"

        step("checking the types of a program that uses it")
        strictly_typed(python, empty)
        step("running that program")
        subprocess.run([python, "-W", "error", "consumer.py"], cwd=empty, check=True, env=environment())
        step("verifying the derivatives")
        verify = [python, "-m", "jsoftmax", "verify"]
        said(
            subprocess.run(
                verify, cwd=empty, check=True, env=environment(), stdout=subprocess.PIPE, text=True
            ).stdout.splitlines()[-1]
        )
        step("done")


if __name__ == "__main__":
    main()
