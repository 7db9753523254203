"""Refuses wrong flags of training.main once, with exit code 2, before a job starts its ranks.

Of ranks that end together Slurm reports one that it had to kill, as if it had hung, and the job would start again.
"""

import sys

from training.config.given import Refusal
from training.config.params import parse

try:
    parse(sys.argv[1:])
except Refusal as refusal:
    sys.exit(print(f"error: {refusal}", file=sys.stderr) or 2)
