"""Train one language model in several processes, each with its part of the rows and of the vocabulary.

    python examples/many_processes.py                     four processes of one device each
    python examples/many_processes.py --processes 1       one process: the same losses, to rounding

The processes talk over this machine's loopback as they would over a network: `--process` and `--coordinator` start one
of them by hand, on any machine. Every few steps they save a checkpoint, all together. If one of them dies, the others
say so and end; started again, with as many processes as you like, they go on from the last checkpoint.
"""

import argparse
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from language_model import LanguageModel, Settings, load, windows
from rich.progress import Progress

import jsoftmax

SETTINGS = Settings(vocabulary=4096, width=32, layers=1, heads=2, context=16, batch_size=8, steps=12)
FAILED, STALLED = 70, 75  # exit statuses: another process failed; a step took too long


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train one language model in several processes.")
    parser.add_argument("--processes", type=int, default=4, help="how many there are")
    parser.add_argument("--devices", type=int, default=4, help="how many devices they have in all")
    parser.add_argument("--rows", type=int, default=2, help="over how many of these the rows are split")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--checkpoints", help="a folder; left out, a fresh one")
    parser.add_argument("--save-every", type=int, default=4, help="steps from one checkpoint to the next")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds that a step may take")
    parser.add_argument("--process", type=int, help="the number of this process; left out, all are started")
    parser.add_argument("--coordinator", help="host:port of process 0")
    parser.add_argument("--die-at", type=int, help="a step at which the last process is killed, to see what follows")
    return parser.parse_args()


def start_all(options: argparse.Namespace) -> int:
    """One copy of this program for each process; 0 if all of them ended well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    checkpoints = options.checkpoints or tempfile.mkdtemp(prefix="checkpoints-")
    here = options.devices // options.processes
    flags = f"--xla_force_host_platform_device_count={here}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, *sys.argv, "--coordinator", coordinator, "--checkpoints", checkpoints, "--process"]
    running = [subprocess.Popen([*command, str(number)], env=environment) for number in range(options.processes)]
    statuses = [process.wait() for process in running]
    for number, status in enumerate(statuses):
        if status:
            print(f"process {number} ended with status {status}", file=sys.stderr)
    return max(map(abs, statuses))


class Watch:
    """Ends this process with a message if a step takes longer than it may: a lost peer may leave a sum waiting."""

    def __init__(self, options: argparse.Namespace):
        self.number, self.patience = options.process, options.patience
        self.timer = None

    def step(self, number: int, patience: float | None = None) -> None:
        """A new step has begun."""
        self.stop()
        self.timer = threading.Timer(patience or self.patience, self.give_up, [number])
        self.timer.daemon = True
        self.timer.start()

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def give_up(self, step: int) -> None:
        self.end(STALLED, f"step {step} has taken more than {self.patience:g} seconds; another process may be gone")

    def end(self, status: int, reason: str) -> None:
        print(f"process {self.number}: {reason}. Start again to go on from the last checkpoint.", file=sys.stderr)
        sys.stderr.flush()
        os._exit(status)  # at once: an orderly end would wait for the peers


class Trainer:
    """The model, split over a mesh of all devices: rows over "data", the vocabulary over "model"."""

    def __init__(self, rows: int):
        # Neighbouring devices, of one process if it has several, share rows: they talk the most.
        devices = np.array(jax.devices()).reshape(rows, -1)
        self.mesh = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        self.corpus = load(SETTINGS.vocabulary, files=40)
        self.optimizer = optax.adam(SETTINGS.learning_rate)
        self.graph = nnx.split(nnx.eval_shape(lambda: LanguageModel(SETTINGS, nnx.Rngs(SETTINGS.seed))))[0]
        shapes = jax.eval_shape(self.initial_state)
        self.split = jax.tree_util.tree_map_with_path(lambda path, _: self.spec(path), shapes)
        self.shardings = jax.tree.map(functools.partial(NamedSharding, self.mesh), self.split)
        self.initialize = jax.jit(self.initial_state, out_shardings=self.shardings)
        self.update = jax.jit(self.updated, donate_argnums=0, out_shardings=(self.shardings, None))

    @staticmethod
    def spec(path: tuple) -> P:
        """The head's kernel, and what the optimizer keeps for it, is split by classes; the rest is everywhere."""
        return P(None, "model") if "['head']" in jax.tree_util.keystr(path) else P()

    def initial_state(self) -> dict:
        """Made by all processes together: none ever holds more than its part."""
        parameters = nnx.to_pure_dict(nnx.split(LanguageModel(SETTINGS, nnx.Rngs(SETTINGS.seed)))[1])
        return {"parameters": parameters, "optimizer": self.optimizer.init(parameters)}

    def updated(self, state: dict, tokens: jax.Array, labels: jax.Array) -> tuple[dict, jax.Array]:
        def local_loss(parameters, tokens, labels):
            model = nnx.merge(self.graph, parameters)
            total = jsoftmax.linear_softmax_cross_entropy(
                model(tokens), model.head.kernel[...], labels, reduction="sum", axis_name="model"
            )
            return jax.lax.psum(total, "data") / (SETTINGS.batch_size * SETTINGS.context)

        rows = P("data")
        loss = jax.shard_map(local_loss, mesh=self.mesh, in_specs=(self.split["parameters"], rows, rows), out_specs=P())
        value, gradients = jax.value_and_grad(loss)(state["parameters"], tokens, labels)
        updates, optimizer = self.optimizer.update(gradients, state["optimizer"], state["parameters"])
        return {"parameters": optax.apply_updates(state["parameters"], updates), "optimizer": optimizer}, value

    def batch(self, step: int) -> list[jax.Array]:
        """The same for any number of processes, each of which keeps its own rows."""
        generator = np.random.default_rng((SETTINGS.seed, step))
        starts = generator.integers(0, len(self.corpus.train) - SETTINGS.context - 1, SETTINGS.batch_size)
        sharding = NamedSharding(self.mesh, P("data"))
        parts = windows(self.corpus.train, starts, SETTINGS.context)
        return [jax.make_array_from_callback(part.shape, sharding, part.__getitem__) for part in parts]


def restored(manager: ocp.CheckpointManager, trainer: Trainer) -> tuple[dict, int]:
    """The state after the last checkpoint, and the number of the next step."""
    state, last = trainer.initialize(), manager.latest_step()
    if last is None:
        return state, 0
    names = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(state))}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), names)
    saved = manager.restore(last, args=ocp.args.StandardRestore(shapes))
    return jax.tree.unflatten(jax.tree.structure(state), [saved[name] for name in names]), last + 1


def save(manager: ocp.CheckpointManager, step: int, state: dict) -> None:
    leaves = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(state))}
    manager.save(step, args=ocp.args.StandardSave(leaves))
    manager.wait_until_finished()


def train(options: argparse.Namespace, watch: Watch) -> None:
    trainer = Trainer(options.rows)
    choices = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(Path(options.checkpoints).absolute(), options=choices) as manager:
        state, first = restored(manager, trainer)
        with Progress(disable=options.process != 0) as progress:
            task = progress.add_task("training", total=options.steps, completed=first)
            for step in range(first, options.steps):
                # The first step compiles.
                watch.step(step, 5 * options.patience if step == first else None)
                if step == options.die_at and options.process == options.processes - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                state, loss = trainer.update(state, *trainer.batch(step))
                if options.process == 0:
                    print(json.dumps({"step": step, "loss": float(loss)}), flush=True)
                jax.block_until_ready(state)
                if (step + 1) % options.save_every == 0:
                    save(manager, step, state)
                progress.update(task, advance=1)
        watch.stop()


def main() -> int:
    options = arguments()
    if options.process is None:
        return start_all(options)
    watch = Watch(options)
    if options.processes > 1:
        jax.distributed.initialize(
            options.coordinator, options.processes, options.process, heartbeat_timeout_seconds=int(options.patience)
        )
    try:
        train(options, watch)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        watch.end(FAILED, f"another process has failed or cannot be reached ({reason[0][:200]})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
