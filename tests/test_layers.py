"""The shape of the source: imports point downwards only, files stay short, and nothing names a machine."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jsoftmax"

# From the bottom up. A module imports from layers below its own: not from its own, not from above.
LAYERS = [
    {"_platforms", "_shards"},
    {"_axes", "_bins", "_blocks", "_checks", "_dtypes", "_exponentials", "_labels", "_minimize"},
    {"_draws", "_logits", "_matmul", "_trees"},
    {"_attention_logits", "_rows"},
    {"_probabilities", "_reports"},
    {"_filters", "_options", "_statistics"},
    {
        "_activations",
        "_blockwise",
        "_blockwise_attention",
        "_candidates",
        "_counted",
        "_divergences",
        "_losses",
        "_public_statistics",
        "_samplers",
    },
    {
        "_adaptive",
        "_attention",
        "_calibration",
        "_calibration_error",
        "_categorical",
        "_cross_entropy",
        "_distillation",
        "_distributions",
        "_hierarchical",
        "_in_batch",
        "_linear",
        "_sampled",
        "_sampling",
        "_sigmoid",
        "_tokens",
    },
    {"_policies", "_preferences"},
    {"_groups", "categorical"},
    {"__init__"},
    {"reference"},
    {"plots", "testing"},
    {"_bench", "_verify"},
    {"__main__"},
]
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}
MODULES = sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py"))
MOST_LINES = 300

# Written so that this file does not hold what it looks for.
MACHINE_PATHS = re.compile(r"(?<![\w.:/<-])/(?:home|root|Users|work|tmp|opt|mnt|var/folders)" + r"/\w|[A-Z]:\\Users")
REGISTRIES = re.compile(r"https?://(?:\w+\.)?(?:pypi\.org/simple|pythonhosted\.org|registry\.npmjs\.org)|file:" + "///")


def imports(tree: ast.AST) -> set[str]:
    """The modules of jsoftmax that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {module_of(name) for name in names if name.split(".")[0] == "jsoftmax"}
    return found


def module_of(name: str) -> str:
    """`jsoftmax._rows.Rows` is in `_rows`, `jsoftmax.softmax` in `__init__`."""
    parts = name.split(".")[1:]
    known = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((module for module in known if module in MODULES), "__init__")


def imported_by(module: str) -> set[str]:
    path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    return imports(ast.parse(path.read_text(encoding="utf-8")))


def tracked_files() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_every_module_has_one_layer():
    assert sorted(LEVEL) == MODULES
    assert sum(map(len, LAYERS)) == len(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    assert {name for name in imported_by(module) if LEVEL[name] >= LEVEL[module]} == set()


def test_reference_stands_alone():
    assert imported_by("reference") == set()
    assert {module for module in MODULES if "reference" in imported_by(module)} == {"testing", "_verify"}


def test_library_does_not_use_its_tools():
    library = {module for module in MODULES if LEVEL[module] <= LEVEL["__init__"]}
    tools = set(MODULES) - library
    assert {module for module in library if imported_by(module) & tools} == set()


def test_architecture_page_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+`) \|", text, re.MULTILINE)
    listed = [set(re.findall(r"`([\w.]+)`", row)) for row in rows]
    assert [layer for layer in listed if layer & set(MODULES)] == LAYERS[::-1]


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short(module):
    path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


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
    source = "import jsoftmax\nfrom jsoftmax import _checks, softmax\nfrom jsoftmax._rows import Rows\nimport jax\n"
    assert imports(ast.parse(source)) == {"__init__", "_checks", "_rows"}
    slash = "/"
    for path in (f'"{slash}home/me/x"', f"see {slash}tmp/out", "C:" + r"\Users\me"):
        assert MACHINE_PATHS.search(path)
    for harmless in ("out/tmp/x", "https://a.org/home/x", "and/or"):
        assert not MACHINE_PATHS.search(harmless)
    assert REGISTRIES.search("https://" + "pypi.org/simple/x")
