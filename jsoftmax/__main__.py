"""`python -m jsoftmax verify` and `python -m jsoftmax bench`."""

import argparse
import sys

from jsoftmax._commands import bench, verify


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jsoftmax", description="Accurate softmax losses for JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    verifying = commands.add_parser("verify", help="check the gradients of every loss on every device JAX sees")
    timing = commands.add_parser("bench", help="time cross-entropy of a shape beside optax, on this device")
    timing.add_argument("--rows", type=int, default=256, help="how many rows (default: %(default)s)")
    timing.add_argument("--classes", type=int, default=32000, help="of how many classes (default: %(default)s)")
    timing.add_argument("--features", type=int, help="from this many features, by linear cross-entropy")
    timing.add_argument("--dtype", choices=verify.DTYPES[:3], default="float32", help="default: %(default)s")
    for command in (verifying, timing):
        command.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    if arguments.command == "verify":
        return verify.main(arguments.json)
    shape = (arguments.rows, arguments.classes, arguments.features)
    if any(size is not None and size < 1 for size in shape):
        parser.error(f"--rows, --classes and --features must be at least 1, got {', '.join(map(str, shape))}")
    return bench.main(*shape, arguments.dtype, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
