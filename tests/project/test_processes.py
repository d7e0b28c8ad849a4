"""Real processes, each with its part of rows and vocabulary, train as one does; and what happens when one dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).parents[2] / "examples" / "many_processes.py"
STEPS, DIES_AT, PATIENCE = 7, 5, 60


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Runs the program; gives its exit status, the loss of each step and what it said."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiled quickly, as in other tests of values

    def run(processes, *options, checkpoints=None):
        checkpoints = checkpoints or tmp_path_factory.mktemp("checkpoints")
        chosen = ["--processes", processes, "--steps", STEPS, "--checkpoints", checkpoints, "--patience", PATIENCE]
        command = [sys.executable, str(PROGRAM), *map(str, [*chosen, "--save-every", 2, *options])]
        # A wait without end would be a failure to end; the time itself is not what is tested.
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        return done.returncode, {line["step"]: line["loss"] for line in lines}, done.stderr

    return run


@pytest.fixture(scope="module")
def alone(train):
    """The losses of one process with one device."""
    status, losses, said = train(1, "--devices", 1, "--rows", 1)
    assert status == 0, said
    assert list(losses) == list(range(STEPS))
    assert losses[STEPS - 1] < losses[0] - 0.5  # it learns
    return losses


def assert_same(losses, expected):
    for step, loss in losses.items():
        np.testing.assert_allclose(loss, expected[step], rtol=1e-6)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_train_as_one(processes, train, alone):
    status, losses, said = train(processes)
    assert status == 0, said
    assert list(losses) == list(alone)
    assert_same(losses, alone)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_nothing_is_lost(train, alone, tmp_path):
    """The others say why they end, within the time that a step may take; the next start goes on as if nothing was."""
    status, losses, said = train(2, "--die-at", DIES_AT, checkpoints=tmp_path)
    assert status != 0
    assert "process 1 ended with status -9" in said
    assert "process 0: another process has failed or cannot be reached" in said or "another process may be gone" in said
    assert "Start again to go on from the last checkpoint" in said
    assert list(losses) == list(range(DIES_AT))
    status, losses, said = train(4, checkpoints=tmp_path)  # as many processes as you like
    assert status == 0, said
    assert list(losses) == list(range(DIES_AT - 1, STEPS))
    assert_same(losses, alone)
