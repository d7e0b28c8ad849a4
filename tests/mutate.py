"""Small changes to the core, of which each should fail a test, in an order drawn once. Goes on where it stopped.

    make mutate SAMPLE=200

A mutant is one change by an operator of cosmic-ray to one place of `jsoftmax/_rows` or `jsoftmax/_losses`: another
comparison, another number, a condition turned round, a decorator gone. Changes to annotations alone are left out, since
no test should see them, and so are bit operators for arithmetic, which JAX refuses. Each mutant runs the tests of its
file; what survives runs those of the contract, as far as `make test` has them. One fails, and it is killed.
benchmarks/results/mutation.json keeps what became of each. A survivor without a reason, written there by hand, is tried
again by the next call.
"""

import argparse
import ast
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "mutation.json"
CORE = ("jsoftmax/_rows", "jsoftmax/_losses")
SEED = 14
ARITHMETIC_TO_BITS = re.compile(r"Operator_(Add|Sub|Mul|Div|FloorDiv|Mod|Pow)_(Bit|LShift|RShift)")
SECONDS = 1200  # for the tests of one mutant
# What is most likely to see a change, by the file's name; then the contract.
EDGES = [f"contract/test_edges.py::test_{name}" for name in ("bad_input", "bad_dtype", "unknown_option")]
REPORTS = [
    f"contract/test_edges.py::test_checkify_{name}"
    for name in ("reports_labels", "reports_nan", "passes_over_what_takes_no_part")
]
ERRORS = "contract/test_accuracy.py::test_worst_error_in_float32"
SLOPES = "contract/test_transformations.py::test_reverse_mode_by_finite_differences"
ROWS = ["_rows/test_forms.py", "_losses/test_optax_suite.py", ERRORS]
LAYOUTS = [
    f"contract/test_layouts.py::test_equals_one_device[{name}]" for name in ("softmax", "top_k_distillation_loss")
]
LAYOUTS += ["contract/test_layouts.py::test_results_are_split_as_the_rows_they_belong_to"]
OWN = {
    "activations": ["contract/test_edges.py::test_activations_without_a_distribution", *LAYOUTS, *ROWS],
    "axes": [*EDGES, "_policies/test_categorical.py::test_class_axes", "_losses/test_optax_suite.py"],
    "checks": EDGES,
    "cross_entropy": ["_losses/test_focal.py", *ROWS],
    "distillation": ["_losses/test_distillation.py", *LAYOUTS],
    "distributions": ["_losses/test_optax_suite.py", "_policies/test_categorical.py"],
    "divergences": ["_losses/test_distillation.py", "_policies/test_post_training.py"],
    "exponentials": ["_rows/test_exponentials.py", *ROWS],
    "layouts": [*LAYOUTS, "contract/test_sharding.py"],
    "logits": [*ROWS, "contract/test_edges.py::test_temperature_zero"],
    "long_tails": ["_losses/test_margins.py"],
    "margins": ["_losses/test_margins.py"],
    "options": [*EDGES, "_losses/test_optax_suite.py"],
    "partitioned": ["contract/test_sharding.py"],
    "primitives": ["_rows/test_primitives.py", *ROWS],
    "probabilities": [*ROWS, "_losses/test_margins.py", "_losses/test_sigmoid.py"],
    "ranking": ["_losses/test_ranking.py"],
    "reports": ["_rows/test_reports.py", *REPORTS],
    "row_losses": ["_blocks/test_linear.py", "_losses/test_optax_suite.py", *EDGES, "_losses/test_margins.py"],
    "rows": [*ROWS, "_rows/test_support.py", "contract/test_sharding.py"],
    "shards": ["contract/test_sharding.py"],
    "sigmoid": ["_losses/test_sigmoid.py", "_losses/test_optax_suite.py"],
    "state": [*ROWS, "contract/test_sharding.py"],
    "statistics": [SLOPES, *ROWS, "_losses/test_margins.py"],
    "support": ["_rows/test_support.py", "_policies/test_categorical.py"],
    "varying": ["contract/test_sharding.py"],
    "weights": ["_losses/test_margins.py", "_policies/test_policies.py"],
}
CONTRACT = [f"contract/test_{name}.py" for name in ("compiled_facts", "edges", "accuracy", "transformations")]
CONTRACT += ["_rows", "_losses", "contract/test_sharding.py", "contract/test_fuzz.py"]


def sources() -> dict[str, str]:
    paths = [path for folder in CORE for path in sorted((ROOT / folder).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def mutants(name: str, source: str) -> list[dict]:
    """Every change to one file that is more than one of annotations."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast

    found, nodes, lines = [], list(ast_nodes(get_ast(source))), source.splitlines()
    typed = annotations(source)
    for operator_name in sorted(plugins.operator_names()):
        kind = plugins.get_operator(operator_name)
        if kind.arguments() or ARITHMETIC_TO_BITS.search(operator_name):
            continue
        places = [place for node in nodes for place in kind().mutation_positions(node)]
        for occurrence, (place, _) in enumerate(places):
            if not any(start <= place < end for start, end in typed):
                was = {"line": place[0], "was": lines[place[0] - 1].strip()}
                found.append({"file": name, "operator": operator_name, "occurrence": occurrence, **was})
    return found


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """From where to where each goes, in lines and columns."""
    nodes = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.AnnAssign | ast.arg | ast.FunctionDef)
    ]
    found = [node.returns if isinstance(node, ast.FunctionDef) else node.annotation for node in nodes]
    return [((a.lineno, a.col_offset), (a.end_lineno, a.end_col_offset)) for a in found if a is not None]


def mutated(source: str, mutant: dict) -> str:
    from cosmic_ray import mutating, plugins

    return mutating.mutate_code(source, plugins.get_operator(mutant["operator"])(), mutant["occurrence"])


def in_order(found: dict[str, list[dict]]) -> list[dict]:
    """Drawn so that the first of any number hold of each file its share."""
    places = []
    for name, each in found.items():
        draw = random.Random(f"{SEED} {name}")
        draw.shuffle(each)
        places += [((i + draw.random()) / len(each), mutant) for i, mutant in enumerate(each)]
    return [mutant for _, mutant in sorted(places, key=lambda place: place[0])]


def outcome(copy: Path, mutant: dict, source: str, tests: tuple[str, ...]) -> str:
    """Whether a test failed, or the time was too short; some changes are no Python. A crash is no test's doing."""
    path, text = copy / mutant["file"], mutated(source, mutant)
    try:
        compile(text, mutant["file"], "exec")
    except SyntaxError:
        return "no program"
    path.write_text(text, encoding="utf-8")
    try:
        code = in_a_fork(copy, tests)
        return "crashed" if code is not None and code < 0 else {None: "timeout", 0: "survived"}.get(code, "killed")
    finally:
        path.write_text(source, encoding="utf-8")


def in_a_fork(copy: Path, tests: Iterable[str]) -> int | None:
    """pytest's exit code, None if it takes too long. A fork has JAX imported, and no program run yet."""
    child = os.fork()
    if child == 0:
        log = os.open(copy / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        os.chdir(copy)
        import pytest

        code = 1
        try:
            paths = [f"tests/{name}" for name in tests]
            code = int(pytest.main(["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *paths]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    start = time.monotonic()
    while time.monotonic() - start < SECONDS:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@functools.cache
def check_without_change(copy: Path, tests: tuple[str, ...]) -> None:
    """Tests that fail by themselves, or crash, would seem to see every mutant."""
    code = in_a_fork(copy, tests)
    if code != 0:
        raise AssertionError(f"without any change, pytest ends with {code}: {(copy / 'log').read_text()[-4000:]}")


def prepare(copy: Path) -> None:
    """A copy of what tests need, and JAX imported for all forks.

    No cache of programs on disk: with one, those for several devices crash (JAX 0.10.2).
    """
    for name in ("jsoftmax", "tests", "examples", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "_build"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() not in (ROOT, ROOT / "tests")]

    import beartype  # noqa: F401
    import jax  # noqa: F401
    import mpmath  # noqa: F401
    import optax  # noqa: F401
    import scipy.stats  # noqa: F401


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=200, help="how many mutants (default 200)")
    parser.add_argument("--operators", type=Path, required=True, help="where cosmic-ray is installed")
    options = parser.parse_args()
    sys.path.append(str(options.operators))
    from rich.progress import Progress

    source = sources()
    found = {name: mutants(name, text) for name, text in source.items()}
    order = in_order({name: each for name, each in found.items() if each})
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    # What was found out about a file that has changed since is forgotten.
    digests = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in source.items()}
    fresh = [r for r in kept.get("results", []) if kept["sources"][r["file"]] == digests.get(r["file"])]
    kept = {"sources": digests, "mutants": len(order), "results": fresh}
    results = {(r["file"], r["operator"], r["occurrence"]): r for r in fresh}
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        prepare(copy := Path(folder))
        for look in ("own", "contract"):
            for mutant in progress.track(order[: options.sample], description=f"{look} tests"):
                key = mutant["file"], mutant["operator"], mutant["occurrence"]
                before = results.get(key)
                if before and (look == "own" or before["outcome"] != "survived" or "reason" in before):
                    continue
                tests = tuple(CONTRACT if look == "contract" else OWN.get(Path(mutant["file"]).stem, ROWS))
                check_without_change(copy, tests)
                start = time.monotonic()
                now = outcome(copy, mutant, source[mutant["file"]], tests)
                results[key] = {**mutant, "outcome": now, "by": look, "seconds": round(time.monotonic() - start, 1)}
                kept["results"] = list(results.values())
                RESULTS.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                progress.console.print(f"{now:9} {mutant['file']}:{mutant['line']} {mutant['operator']}")
    counts = Counter(result["outcome"] for result in kept["results"])
    print(f"{len(order)} mutants, {len(kept['results'])} tried: {dict(counts)}")


if __name__ == "__main__":
    main()
