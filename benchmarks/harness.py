"""What the subjects share: shapes with names, settings, results on disk. `jsoftmax._commands.bench` does the timing."""

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax

from jsoftmax._commands import bench
from jsoftmax._commands.bench import Program as Program, Row as Row, compiled as compiled, table as table

RESULTS = Path(__file__).parent / "results"
DTYPES = ("float32", "bfloat16")
MAX_SECONDS = 2.0  # of measured turns, for each table

# Rows and classes: as many logits as a step of training has, or as fit a few minutes.
SHAPES = {
    "Llama 2": (256, 32_000),
    "Llama 2, large batch": (2048, 32_000),
    "digits": (65_536, 10),
    "ImageNet": (8192, 1000),
    "GPT-2": (512, 50_257),
    "Llama 3": (256, 128_256),
    "Gemma": (128, 256_000),
    "long tail": (32, 1_000_003),
}


def measure(
    subject: str, shape: str, dtype: str, functions: Mapping[str, Callable], arguments: tuple, **settings: Any
) -> list[Row]:
    """Compile functions of the same arguments, and time them in turns."""
    programs = {name: compiled(function, arguments) for name, function in functions.items()}
    return bench.measure(subject, shape, dtype, programs, **{"max_seconds": MAX_SECONDS, **settings})


def results_name() -> str:
    """The device and the JAX release, as a file's name."""
    kind = jax.devices()[0].device_kind.replace(" ", "-").lower()
    return f"{kind}-jax{jax.__version__}"


def save(rows: Iterable[Row], name: str, absent: Iterable[str] = ()) -> Path:
    """The rows and the versions that gave them; rows of subjects that were not measured again are kept."""
    path = RESULTS / f"{name}.json"
    new = [dataclasses.asdict(row) for row in rows]
    subjects = {row["subject"] for row in new}
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    device = jax.devices()[0]
    facts = {
        "device": f"{device.platform} ({device.device_kind})",
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "load": [round(number, 2) for number in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "absent": sorted(absent),
        "rows": [row for row in old if row["subject"] not in subjects] + new,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return path


def stored(name: str) -> Any:
    """What a file in benchmarks/results holds."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def load(name: str) -> list[Row]:
    """Rows of a file of results. Older files have fewer fields."""
    rows = stored(name)["rows"]
    blank = dict.fromkeys(field.name for field in dataclasses.fields(Row))
    return [Row(**{**blank, **row}) for row in rows]
