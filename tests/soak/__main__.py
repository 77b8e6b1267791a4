"""`python -m soak`: see the package."""

import argparse
import sys

from rich.console import Console

from soak.run import soak
from tokendance.server.malloc import limit_arenas

parser = argparse.ArgumentParser(prog="soak", description="The server under load.")
parser.add_argument("--seconds", type=float, default=600.0)
parser.add_argument("--seed", type=int, default=0)
given = parser.parse_args()
limit_arenas()  # as `tokendance serve` does
console = Console(width=None if sys.stdout.isatty() else 140)
sys.exit(1 if soak(given.seconds, given.seed, console) else 0)
