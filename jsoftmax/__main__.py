"""`python -m jsoftmax verify` and `python -m jsoftmax bench`."""

import argparse
import sys

from jsoftmax import _bench, _verify


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jsoftmax", description="Accurate softmax losses for JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="check the gradients of every loss on every device JAX sees")
    bench = commands.add_parser("bench", help="time cross-entropy of a shape beside optax, on this device")
    bench.add_argument("--rows", type=int, default=256, help="how many rows (default: %(default)s)")
    bench.add_argument("--classes", type=int, default=32000, help="of how many classes (default: %(default)s)")
    bench.add_argument("--features", type=int, help="from this many features, by linear cross-entropy")
    bench.add_argument("--dtype", choices=_verify.DTYPES[:3], default="float32", help="default: %(default)s")
    for command in (verify, bench):
        command.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    if arguments.command == "verify":
        return _verify.main(arguments.json)
    shape = (arguments.rows, arguments.classes, arguments.features)
    if any(size is not None and size < 1 for size in shape):
        parser.error(f"--rows, --classes and --features must be at least 1, got {', '.join(map(str, shape))}")
    return _bench.main(*shape, arguments.dtype, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
