"""Stored results as the short tables of the page on benchmarks."""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.growth import PLACES, curve, slope
from benchmarks.harness import DTYPES, SHAPES, Row, stored

DENSE, LINEAR = "cross-entropy, value and gradient", "linear cross-entropy, value and both gradients"
MEGABYTE = 1e6


class Goal(NamedTuple):
    name: str
    subject: str
    shape: str
    dtype: str
    most: float
    measure: Callable[[Row], float | None]


def _ratio(row: Row) -> float:
    return row.ratio


def _temporary(row: Row) -> float | None:
    return row.temp_mb


# Of time, in units of the peer's; of temporary memory, in MB: numbers per row for losses on logits, and the kernel's
# gradient and a block for linear ones: its logits, and a fiftieth for its features and numbers per row.
_BLOCK_AND_GRADIENT = 4 * (512 * 32_768 + 512 * 32_768) / MEGABYTE
GOALS = [
    Goal("time", DENSE, "256×32000", "float32", 1.0, _ratio),
    Goal("time", DENSE, "256×32000", "bfloat16", 0.5, _ratio),
    Goal("temps MB", DENSE, "256×32000", "float32", 2.0, _temporary),
    Goal("temps MB", DENSE, "256×32000", "bfloat16", 2.0, _temporary),
    Goal("time", LINEAR, "2048×512×32768", "float32", 0.75, _ratio),
    Goal("time", LINEAR, "2048×512×32768", "bfloat16", 0.5, _ratio),
    Goal("temps MB", LINEAR, "2048×512×32768", "float32", _BLOCK_AND_GRADIENT * 1.02, _temporary),
    Goal("temps MB", LINEAR, "2048×512×32768", "bfloat16", _BLOCK_AND_GRADIENT * 1.02, _temporary),
]


def _find(rows: list[Row], subject: str, shape: str, dtype: str, program: str) -> Row | None:
    wanted = (subject, shape, dtype, program)
    return next((row for row in rows if (row.subject, row.shape, row.dtype, row.program) == wanted), None)


def comparison(rows: list[Row], subject: str) -> str:
    """Ours beside optax, a line for each shape with a name."""
    lines = [f"{'':<43}{'optax ms':>9}{'ours ms':>9}{'ratio':>7}{'temps MB':>16}{'error':>15}"]
    for model, (count, classes) in SHAPES.items():
        for dtype in DTYPES:
            peer, ours = (_find(rows, subject, f"{count}×{classes}", dtype, name) for name in ("optax", "jsoftmax"))
            if peer is None or ours is None:
                continue
            memory, errors = f"{peer.temp_mb:.1f} → {ours.temp_mb:.1f}", f"{peer.error:.0e} → {ours.error:.0e}"
            times = f"{peer.median_ms:>9.2f}{ours.median_ms:>9.2f}{ours.ratio:>7.2f}"
            lines.append(f"{f'{model}, {count}×{classes}':<34}{dtype:<9}{times}{memory:>16}{errors:>15}")
    return "\n".join(lines)


def goals(rows: list[Row]) -> str:
    lines = [f"{'':<58}{'':<10}{'goal':>6}{'is':>8}"]
    for goal in GOALS:
        row = _find(rows, goal.subject, goal.shape, goal.dtype, "jsoftmax")
        reached = goal.measure(row) if row else None
        if reached is not None:
            verdict = "reached" if reached <= goal.most else "missed"
            name = f"{goal.subject.split(',')[0]}, {goal.shape}, {goal.dtype}"
            lines.append(f"{name:<58}{goal.name:<10}{goal.most:>6.3g}{reached:>8.3g}  {verdict}")
    return "\n".join(lines)


def slopes(rows: list[Row]) -> str:
    """The exponents of the curves of growth."""
    lines = [f"{'':<14}{'sizes':>14}{'optax':>8}{'ours':>8}"]
    for name in PLACES:
        sizes = curve(rows, name, "jsoftmax")[0]
        exponents = [slope(*curve(rows, name, program)) for program in ("optax", "jsoftmax")]
        peer = "" if name == "block size" else f"{exponents[0]:.2f}"
        lines.append(f"{name:<14}{f'{sizes[0]} to {sizes[-1]}':>14}{peer:>8}{exponents[1]:>8.2f}")
    return "\n".join(lines)


def disagreements(one: list[Row], other: list[Row], clear: float = 1.1) -> list[str]:
    """Where two runs differ on who is ahead of the reference, though in one of them the ratio is clear."""

    def ratios(rows: list[Row]) -> dict[tuple, float]:
        return {(row.subject, row.shape, row.dtype, row.program): row.ratio for row in rows}

    firsts, seconds = ratios(one), ratios(other)
    pairs = {key: (first, seconds[key]) for key, first in firsts.items() if key in seconds}
    return [
        f"{', '.join(key)}: {first:.2f} and {second:.2f}"
        for key, (first, second) in pairs.items()
        if (first - 1) * (second - 1) < 0 and max(first, second, 1 / first, 1 / second) > clear
    ]


def ahead_of_time() -> str:
    """What `make test-aot` found."""
    lines = [f"{'':<64}{'temps GB':>9}{'moved GB':>9}  instructions"]
    for row in stored("aot")["rows"]:
        name = f"{row['work']}, {row['target']}"
        instructions = "  " + "+".join(f"{number:.0f}" for number in row.get("instructions", ()))
        sizes = f"{row['temp_bytes'] / 1e9:>9.2f}{row['moved_bytes'] / 1e9:>9.1f}"
        lines.append(f"{name:<64}{sizes}{instructions}".rstrip())
    return "\n".join(lines)


def log_probabilities() -> str:
    """What `python -m benchmarks.log_probabilities` found."""
    lines = [f"{'':<30}{'from linear':>12}{'same bits':>11}{'from float64':>14}"]
    facts = stored("log-probabilities")
    for dtype in ("float32", "bfloat16"):
        lines.append(f"{dtype} features")
        for row in facts["found"]:
            if row["dtype"] == dtype:
                numbers = f"{row['from_linear']:>12.1e}{row['same_bits']:>11.0%}{row['from_float64']:>14.1e}"
                lines.append(f"  {row['way']:<28}{numbers}")
    return "\n".join(lines)


def fuzzed() -> str:
    """What `make fuzz` found: rows, seconds and the worst error in ulps of each function, form and dtype."""
    facts = stored("fuzz")
    numbers = {tuple(name.split("/")): each for name, each in facts["found"].items()}
    dtypes = sorted({dtype for _, dtype, _ in numbers}, key=lambda dtype: ("8" in dtype, dtype))
    heads = "".join(f"{dtype.removeprefix('float8_'):>9}" for dtype in dtypes)
    lines = [f"{'':<34}{'rows':>9}{'s':>6}{heads}"]
    for function, form in sorted({(function, form) for function, _, form in numbers}):
        each = [numbers.get((function, dtype, form)) for dtype in dtypes]
        rows, seconds = (sum(one[key] for one in each if one) for key in ("rows", "seconds"))
        worst = "".join(f"{one['worst_ulps']:>9.2f}" if one and seconds else f"{'':>9}" for one in each)
        lines.append(f"{f'{function}, {form}':<34}{rows:>9}{seconds:>6.0f}{worst}".rstrip())
    return "\n".join([*lines, f"{facts['rows']:,} rows in all, JAX {facts['jax']}"])


def mutated() -> str:
    """What `make mutate` found: how many small changes a test noticed, and the others with the reason for each."""
    facts = stored("mutation")
    tried = [result for result in facts["results"] if result["outcome"] != "no program"]
    survivors = [result for result in tried if result["outcome"] == "survived"]
    noticed = len(tried) - len(survivors)
    lines = [
        f"{noticed} of {len(tried)} noticed ({noticed / len(tried):.0%}), of {facts['mutants']:,} in all; the others:"
    ]
    for result in sorted(survivors, key=lambda result: (result["file"], result["line"])):
        change = result["operator"].removeprefix("core/").removeprefix("Replace")
        lines += [
            f"{result['file'].removeprefix('jsoftmax/')}, {change}: {result['was']}"[:100],
            f"    {result['reason']}",
        ]
    return "\n".join(lines)


def catalogue() -> str:
    """What `python -m benchmarks.catalogue` found."""
    facts = stored("catalogue")
    lines = [f"{'':<30}{'reciprocal rank':>16}{'NDCG@10':>9}"]
    lines += [f"{row['loss']:<30}{row['reciprocal_rank']:>16.3f}{row['ndcg_10']:>9.3f}" for row in facts["rows"]]
    return "\n".join(lines)
