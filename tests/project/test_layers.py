"""The shape of the source: imports point downwards only, files stay short, and nothing names a machine."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "jsoftmax"

# From the bottom up. A wing imports from itself and from those below: not sideways, not from above.
WINGS = [
    {"_rows"},
    {"_losses"},
    {"_attention", "_blocks", "_calibration", "_policies"},
    {"_vocabularies"},
    {"categorical", "ranking"},
    {"__init__"},
    {"reference"},
    {"plots", "testing"},
    {"_commands"},
    {"__main__"},
]
LEVEL = {wing: level for level, wings in enumerate(WINGS) for wing in wings}
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 300

# Written so that this file does not hold what it looks for.
MACHINE_PATHS = re.compile(r"(?<![\w.:/<-])/(?:home|root|Users|work|tmp|opt|mnt|var/folders)" + r"/\w|[A-Z]:\\Users")
REGISTRIES = re.compile(r"https?://(?:\w+\.)?(?:pypi\.org/simple|pythonhosted\.org|registry\.npmjs\.org)|file:" + "///")


def imports(tree: ast.AST) -> set[str]:
    """The wings of jsoftmax, or modules beside them, that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {wing_of(name) for name in names if name.split(".")[0] == "jsoftmax"}
    return found


def wing_of(name: str) -> str:
    """`jsoftmax._rows.rows.Rows` is in `_rows`, `jsoftmax.softmax` in `__init__`."""
    first = [*name.split(".")[1:], "__init__"][0]
    return first if first in LEVEL else "__init__"


def wing_of_file(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_by(wing: str) -> set[str]:
    """What the files of a wing import from outside it."""
    files = [path for path in FILES if wing_of_file(path) == wing]
    return set().union(*(imports(ast.parse(path.read_text(encoding="utf-8"))) for path in files)) - {wing}


def tracked_files() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_every_file_is_in_a_wing():
    assert {wing_of_file(path) for path in FILES} == set(LEVEL)
    assert sum(map(len, WINGS)) == len(LEVEL)


@pytest.mark.parametrize("wing", sorted(LEVEL))
def test_imports_point_downwards(wing):
    assert {name for name in imported_by(wing) if LEVEL[name] >= LEVEL[wing]} == set()


def test_reference_stands_alone():
    assert imported_by("reference") == set()
    assert {wing for wing in LEVEL if "reference" in imported_by(wing)} == {"testing", "_commands"}


def test_library_does_not_use_its_tools():
    library = {wing for wing in LEVEL if LEVEL[wing] <= LEVEL["__init__"]}
    assert {wing for wing in library if imported_by(wing) - library} == set()


def test_every_wing_says_what_it_is_for():
    """And what it may import; and hides no code in its `__init__`."""
    for wing in LEVEL:
        if (PACKAGE / wing).is_dir():
            tree = ast.parse((PACKAGE / wing / "__init__.py").read_text(encoding="utf-8"))
            assert "Imports" in ast.get_docstring(tree)
            assert len(tree.body) == 1


def test_architecture_page_names_every_wing():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.partition("## The wings")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+`) \|", section, re.MULTILINE)
    assert [set(re.findall(r"`([\w.]+)`", row)) for row in rows] == WINGS[::-1]


def test_tests_stand_where_their_wings_do():
    """What tests a wing is in a folder of its name; what holds for all of them in `contract`."""
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {folder for folder in folders - {"contract", "project"} if not (PACKAGE / folder).is_dir()} == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


# Those of `_rows/varying.py` also do where JAX checks over which devices arrays vary.
JAX_LOOPS = re.compile(r"lax\.(?:scan|while_loop|fori_loop|cond)\(|jnp\.searchsorted\(|\w\.defvjp\(")


def test_loops_branches_and_reverse_rules_are_our_own():
    library = [path for path in FILES if LEVEL[wing_of_file(path)] <= LEVEL["__init__"]]
    found = {str(path.relative_to(PACKAGE)) for path in library if JAX_LOOPS.search(path.read_text(encoding="utf-8"))}
    assert found == {"_rows/varying.py"}


PRIVATE_JAX = re.compile(r"jax\._src")


def test_what_is_private_in_jax_is_used_in_one_place():
    """Which does without it where it has moved, as its test shows."""
    texts = {path: path.read_bytes() for path in tracked_files()}
    found = {
        path.relative_to(ROOT).as_posix() for path, text in texts.items() if PRIVATE_JAX.search(text.decode("latin-1"))
    }
    assert found == {"jsoftmax/_rows/reports.py", "tests/_rows/test_reports.py"}


def test_no_file_names_a_machine_or_a_registry():
    found = []
    for path in tracked_files():
        data = path.read_bytes()
        if b"\0" not in data:
            for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
                if MACHINE_PATHS.search(line) or REGISTRIES.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}")
    assert found == []


def test_what_is_looked_for_is_found():
    source = (
        "from jsoftmax._rows import checks\nfrom jsoftmax import categorical, softmax\nimport jax\nimport jsoftmax\n"
    )
    assert imports(ast.parse(source)) == {"__init__", "_rows", "categorical"}
    slash = "/"
    for path in (f'"{slash}home/me/x"', f"see {slash}tmp/out", "C:" + r"\Users\me"):
        assert MACHINE_PATHS.search(path)
    for harmless in ("out/tmp/x", "https://a.org/home/x", "and/or"):
        assert not MACHINE_PATHS.search(harmless)
    assert REGISTRIES.search("https://" + "pypi.org/simple/x")
