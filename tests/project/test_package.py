"""What `make check-package` and `make test-matrix` hold, as far as it costs little: the whole is in those."""

import json
import re
import sys
from importlib import metadata
from pathlib import Path

import matrix
import package
import soak

import jsoftmax

ROOT = Path(__file__).parents[2]
STORED = json.loads(matrix.RESULTS.read_text(encoding="utf-8"))
SOAK = json.loads(soak.RESULTS.read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "supported-versions.md").read_text(encoding="utf-8")
# A name, and nothing but a Python version or a system as its condition.
NEED = re.compile(r"([\w.-]+)")


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_import_finds_no_device_and_changes_no_setting():
    found = package.importing(sys.executable, ROOT, PYTHONPATH=str(ROOT))
    assert found["changed"] == []
    assert not found["found_device"]
    assert Path(found["file"]) == Path(jsoftmax.__file__)


def test_consumer_uses_every_public_name():
    text = (ROOT / "tests" / "consumer.py").read_text(encoding="utf-8")
    names = [name for name, value in vars(jsoftmax).items() if callable(value) and not name.startswith("_")]
    assert [name for name in names if not re.search(rf"jsoftmax\.{name}\b", text)] == []


def test_a_copied_bit_is_told_from_another(tmp_path):
    (tmp_path / "a.whl").write_text("1")
    (tmp_path / "b.whl").write_text("2")
    first, second = package.digests({name: tmp_path / name for name in ("a.whl", "b.whl")}).values()
    assert first != second


def test_oldest_pins_are_the_floors():
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", matrix.PINS["oldest"].read_text(encoding="utf-8"), re.MULTILINE))
    for name, floor in matrix.floors().items():
        assert pins[name].removesuffix(".0") == floor.removesuffix(".0")


def test_a_cell_counts_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    (tmp_path / "test_x.py").write_text(
        "import pytest\n\ndef test_a(): pass\n\ndef test_b(): assert 0\n\ndef test_c(): pytest.skip()\n"
    )
    counts = matrix.run(sys.executable, "test_x.py")
    assert [counts[name] for name in matrix.COUNTS[:3]] == [1, 1, 1]
    assert matrix.run(sys.executable, "nowhere")["failed"] == 1


def runtime_dependencies():
    """What `pip install jsoftmax` installs, from the metadata of what is installed here."""
    project = matrix.project()
    found, open_names = set(), [NEED.match(need)[0] for need in project["dependencies"]]
    while open_names:
        name = canonical(open_names.pop())
        if name not in found:
            found.add(name)
            needs = metadata.requires(name) or []
            open_names += [NEED.match(need)[0] for need in needs if "extra ==" not in need]
    return found


def test_licences_of_all_dependencies_are_listed():
    rows = re.findall(r"^\| ([\w-]+) \| ([^|]+) \|", PAGE.partition("## Licences")[2], re.MULTILINE)
    listed = {canonical(name): licence for name, licence in rows[1:]}
    assert set(listed) >= runtime_dependencies()
    assert all(listed.values())


def test_page_shows_the_stored_matrix():
    lines = [line for line in PAGE.partition("## Tested")[2].partition("\n## ")[0].splitlines() if line.startswith("|")]
    assert lines == matrix.table(STORED)
    assert len(lines) > 2


def test_oldest_cells_had_the_oldest():
    for name, cell in STORED["cells"].items():
        if name.endswith("oldest"):
            assert cell["versions"]["jax"] == matrix.floors()["jax"]


def test_page_shows_the_stored_soak():
    assert SOAK["differing"] == 0
    assert SOAK["caches"] == SOAK["caches_when_warm"]
    assert SOAK["memory_growth"] <= soak.MOST_GROWTH
    section = PAGE.partition("## An hour")[2].partition("\n## ")[0]
    for shown in (f"{SOAK['calls']:,} calls", f"{SOAK['shapes']} pairs", f"{SOAK['minutes']:.0f} minutes"):
        assert shown in section
    assert f"{SOAK['memory_growth']:.1%}".replace("%", " %") in section
    assert f"{SOAK['compiled_again']} times" in section
