"""The tools of the benchmarks: that they time in turns, keep what they measured, and count right. No test is timed."""

import json
import math
import sys

import jax
import numpy as np
import optax
import pytest

import jsoftmax
from benchmarks import (
    aot,
    catalogue,
    figures,
    gpu,
    growth,
    harness,
    head_sharding,
    large_vocabulary,
    log_probabilities,
    peers,
    report,
    sass,
)
from benchmarks.__main__ import SUBJECTS, main as benchmark
from jsoftmax import __main__ as command
from jsoftmax._commands import bench
from jsoftmax._commands.bench import Program, Row

pytestmark = pytest.mark.exact

BLANK = dict.fromkeys(Row.__dataclass_fields__)


def row(**fields):
    return Row(**{**BLANK, "median_ms": 1.0, "spread_ms": 0.1, "ratio": 1.0, "dtype": "float32", **fields})


def test_programs_take_turns():
    calls = []
    programs = {name: Program(lambda name=name: calls.append(name) or name) for name in "ab"}
    rows = bench.measure("s", "1×1", "float32", programs, reference="a", limit="b", error=len, repeats=7)
    assert calls == ["a", "a", "b", "b"] + 7 * ["a", "b"]
    assert [(r.program, r.error) for r in rows] == [("a", 1), ("b", None)]  # the limit computes something else
    assert rows[0].ratio == 1
    assert rows[1].of_limit == 1


def test_turns_end_when_time_is_up():
    calls = []
    bench.measure("s", "1×1", "float32", {"a": Program(lambda: calls.append(1))}, reference="a", max_seconds=0.0)
    assert len(calls) == 2 + bench.FEWEST_TURNS


def test_what_is_measured_again_replaces_what_was_there(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    harness.save([row(subject="x", program="a"), row(subject="y", program="b")], "device")
    harness.save([row(subject="x", program="c")], "device", absent=["torch"])
    assert [(r.subject, r.program) for r in harness.load("device")] == [("y", "b"), ("x", "c")]
    facts = json.loads((tmp_path / "device.json").read_text())
    assert facts["absent"] == ["torch"]
    del facts["rows"][0]["peak_mb"]  # as in older files
    (tmp_path / "device.json").write_text(json.dumps(facts))
    assert harness.load("device")[0].peak_mb is None


@pytest.mark.parametrize("path", sorted(harness.RESULTS.glob("*-jax*.json")), ids=lambda path: path.stem)
def test_stored_results_can_be_read(path):
    rows = harness.load(path.stem)
    assert {"optax", "jsoftmax"} <= {r.program for r in rows}
    shown = harness.table(rows)
    assert all(r.program in shown for r in rows)


def test_slopes_of_known_powers():
    """time = 3 · size²."""
    rows = [row(subject="growth with classes", shape=f"9×{n}", program="p", median_ms=3.0 * n**2) for n in (10, 20, 80)]
    sizes, times = growth.curve(rows, "classes", "p")
    np.testing.assert_array_equal(sizes, [10, 20, 80])
    assert growth.slope(sizes, times) == pytest.approx(2)


def linear_growth(*programs):
    return [
        row(subject=f"growth with {name}", shape="×".join(4 * [str(n)]), program=program, median_ms=float(n))
        for name in growth.PLACES
        for n in (8, 16)
        for program in programs
    ]


def test_slopes_are_shown_for_each_curve():
    """Blocks are ours alone."""
    lines = report.slopes(linear_growth("jsoftmax", "optax")).splitlines()[1:]
    assert [line.count("1.00") for line in lines] == [2, 2, 2, 1]


def test_figures_are_drawn(tmp_path):
    rows = linear_growth("jsoftmax")
    rows.append(row(subject="cross-entropy, value and gradient", shape="2×3", program="jsoftmax"))
    figures.draw(rows, tmp_path / "device.json")
    assert {path.name for path in tmp_path.iterdir()} == {"device.svg", "device-growth.svg"}
    assert (tmp_path / "device-growth.svg").read_text().count("slope 1.00") >= len(growth.PLACES)


@pytest.mark.parametrize("features", [[], ["--features", "8"]], ids=["logits", "features"])
def test_command_measures_a_shape(features, monkeypatch, capsys):
    arguments = ["bench", "--rows", "16", "--classes", "40", *features, "--json"]
    monkeypatch.setattr(sys, "argv", ["jsoftmax", *arguments])
    assert command.main() == 0
    rows = [Row(**fields) for fields in json.loads(capsys.readouterr().out)]
    assert {r.shape for r in rows} == {"16×8×40" if features else "16×40"}
    ours = [r for r in rows if r.program == "jsoftmax"]
    assert len(ours) == (1 if features else 2)
    assert all(r.error < 1e-6 and r.median_ms > 0 and r.of_limit > 0 for r in ours)


def test_command_needs_sizes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jsoftmax", "bench", "--rows", "0"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--rows, --classes and --features must be at least 1, got 0, 32000" in capsys.readouterr().err


def test_every_subject_can_run():
    assert all(callable(module.run) for module in SUBJECTS.values())
    assert set(peers.absent()) <= set(peers.OPTIONAL.values())


@pytest.mark.slow
def test_script_for_a_gpu(monkeypatch, capsys, tmp_path):
    """Small, and on whatever device is here: every part has results, and those that can be wrong are right."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", "--quick"])
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    with pytest.raises(SystemExit) as ended:
        benchmark()
    assert ended.value.code == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["ulps"], r["gap"]) for r in found if "ulps" in r] == [
        (dtype, gap) for dtype in ("float32", "bfloat16", "float16") for gap in gpu.GAPS
    ]
    programs = {r["program"] for r in found if "program" in r}
    assert {"jsoftmax", "optax", "jax.nn", "limit", "jsoftmax, blocks of 4"} <= programs
    assert any("copy TB/s" in r for r in found)
    assert found[-2]["gradients verified"] == gpu.QUICK.verified
    assert "_verified" in found[-1]["part"]
    assert not list(tmp_path.iterdir())


def test_script_for_a_gpu_sees_a_wrong_loss(monkeypatch):
    usual = optax.softmax_cross_entropy_with_integer_labels
    monkeypatch.setattr(jsoftmax, "softmax_cross_entropy_with_integer_labels", usual)
    by_gap = {r["gap"]: r["ok"] for r in gpu._errors(gpu.QUICK) if r["ulps"] == "float32"}
    assert not any(ok for gap, ok in by_gap.items() if gap >= 10)


PROGRAM = """
%condition (state: (s32[], f32[4])) -> pred[] {
  %most = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %most), direction=LT
}

%body (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = f32[4]{0} get-tuple-element(%state), index=1
  ROOT %y = f32[4]{0:T(128)} fusion(%x), kind=kLoop, calls=%add
}

ENTRY %main (z: bf16[2,5]) -> f32[4] {
  %z = bf16[2,5]{1,0} parameter(0)
  %wide = f32[2,5]{1,0} convert(%z)
  ROOT %loop = (s32[], f32[4]{0}) while(%wide), condition=%condition, body=%body
}
"""


def test_moved_bytes_of_a_program():
    """The conversion reads 20 bytes and writes 40; each of three turns reads 16 and writes 16."""
    assert aot.moved_bytes(PROGRAM) == 60 + 3 * 32


def test_disagreements_of_two_runs():
    """Named where one is clearly ahead, and another run says the contrary; not where both are near 1, or agree."""
    ratios = {
        "a": (0.95, 1.05),
        "b": (0.8, 1.02),
        "c": (1.02, 0.8),
        "d": (1.5, 3.0),
        "e": (0.5, 0.9),
        "only one": (0.1,),
    }
    runs = [
        [row(subject="s", shape="1×1", program=name, ratio=pair[i]) for name, pair in ratios.items() if len(pair) > i]
        for i in range(2)
    ]
    assert report.disagreements(*runs) == ["s, 1×1, float32, b: 0.80 and 1.02", "s, 1×1, float32, c: 1.02 and 0.80"]


def test_page_on_large_vocabularies_shows_the_stored_results():
    """Operations, temporaries, time, held-out loss and perplexity of each loss."""
    facts = json.loads((harness.RESULTS / "large-vocabulary.json").read_text(encoding="utf-8"))
    page = (harness.RESULTS.parents[1] / "docs" / "large-vocabularies.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    for found in facts["rows"]:
        shown = f"{found['operations_per_row']:,}", f"{found['temp_mb']:.1f} MB", f"{found['step_ms']:.0f} ms"
        (row,) = (row for row in cells if tuple(row[1:4]) == shown)
        if found["loss"] != "full":  # the same numbers as the linear loss
            assert row[4:] == [f"{found['held_out_nats']:.2f}", f"{math.exp(found['held_out_nats']):.0f}"]
    assert ["frequencies alone", f"{facts['unigram_nats']:.2f}"] in [[row[0], row[-2]] for row in cells]


def test_stored_counts_are_within_their_bounds():
    rows = json.loads(aot.RESULTS.read_text(encoding="utf-8"))["rows"]
    assert {(r["work"], r["target"]) for r in rows} == {(work, target) for work in aot.WORKS for target in aot.TARGETS}
    for found in rows:
        work = aot.WORKS[found["work"]]
        assert found["temp_bytes"] <= work.most_temp
        assert found["moved_bytes"] <= work.most_moved
        if "H200" in found["target"]:
            for number, most in zip(found["instructions"], work.most_instructions, strict=True):
                assert number <= most


LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   @!P0 FADD R4, R2, R3 ;
.L_x_0:
        /*0020*/                   FMUL R4, R4, R4 ;
        /*0030*/                   NOP ;
        /*0040*/                   @P1 BRA `(%s) ;
        /*0050*/                   EXIT ;
.L_x_1:
        /*0060*/                   BRA `(.L_x_1);
"""


@pytest.mark.parametrize(("target", "loops"), [(".L_x_0", True), (".L_x_1", False)])
def test_instructions_of_a_listing(target, loops):
    """Six that do something; a branch back is a loop, but not the one that ends every kernel."""
    assert sass.counted(LISTING % target) == (6, loops)


def test_stored_messages_do_not_depend_on_the_number_of_blocks():
    heads = json.loads(aot.RESULTS.read_text(encoding="utf-8"))["heads"]
    assert {(r["head"], r["axes"]) for r in heads} == {(h, k) for h in head_sharding.HEADS for k in head_sharding.KINDS}
    for found in heads:
        assert found["sent"] == found["with fewer blocks"]
        assert sum(found["sent"].values()) == (1 if found["head"] == "classes" else 2)


def test_messages_of_a_heads_size_are_counted():
    program = """
  %a = bf16[8,64]{1,0} all-gather(%k), channel_id=1
  %b = (f32[], bf16[8,32]{1,0}) all-reduce(%s, %g), channel_id=2
  %c = f32[16,8]{1,0} all-reduce(%h), channel_id=3
"""
    assert head_sharding.head_sized(program, 8, 64) == {"all-gather": 1, "all-reduce": 1 + 1}
    assert head_sharding.head_sized(program, 8, 1024) == {}


def test_nine_in_ten_small_changes_were_noticed():
    """And it is said of each other one why no test could."""
    stored = json.loads((harness.RESULTS / "mutation.json").read_text(encoding="utf-8"))["results"]
    tried = [result for result in stored if result["outcome"] != "no program"]
    survivors = [result for result in tried if result["outcome"] == "survived"]
    assert len(survivors) <= len(tried) / 10
    assert all(result["reason"] for result in survivors)


@pytest.mark.slow
def test_differences_of_log_probabilities():
    """At a small size: float64 is near, rounding the kernel is not, and every way is on the page's table."""
    found = log_probabilities.run(rows=64, features=16, classes=256)["found"]
    worst = {(row["way"], row["dtype"]): row["from_float64"] for row in found}
    for (way, dtype), difference in worst.items():
        rounds = way == "bfloat16 logits" or (dtype == "bfloat16" and way not in ("dense", 'precision="highest"'))
        assert difference > 1e-4 if rounds else difference < 1e-5, (way, dtype)
    stored = json.loads((harness.RESULTS / "log-probabilities.json").read_text(encoding="utf-8"))["found"]
    assert [(row["way"], row["dtype"]) for row in stored] == list(worst)


@pytest.mark.parametrize(("t", "power"), [(0.0, 1.0), (1.0, catalogue.NEGATIVES / (large_vocabulary.VOCABULARY - 1))])
def test_generalized_binary_cross_entropy(t, power):
    """Where all logits are 0, each question costs log 2: the right item's by its power, and each wrong one's."""
    head, features = np.zeros((large_vocabulary.VOCABULARY, 4), np.float32), np.ones((3, 4), np.float32)
    drawn = jax.random.randint(jax.random.key(0), (catalogue.NEGATIVES,), 0, large_vocabulary.VOCABULARY)
    loss = catalogue.generalized_binary(head, features, drawn[:3], jax.random.key(0), t)  # each label drawn once
    np.testing.assert_allclose(loss, (power + catalogue.NEGATIVES - 1) * math.log(2), rtol=1e-6)
    stored = json.loads((harness.RESULTS / "catalogue.json").read_text(encoding="utf-8"))["rows"]
    assert [row["loss"] for row in stored] == list(catalogue.losses())
