"""`python -m jsoftmax verify`."""

import argparse
import sys

from jsoftmax import _verify


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jsoftmax", description="Accurate softmax losses for JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="check the gradients of every loss on every device JAX sees")
    verify.add_argument("--json", action="store_true", help="print the results as JSON")
    return _verify.main(parser.parse_args().json)


if __name__ == "__main__":
    sys.exit(main())
