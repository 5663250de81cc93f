"""Train and evaluate one model: ``python run_recbole_mm.py --model=MUFASA --dataset=ml-100k``."""

import sys

from recbole_mm.cli import run_main

if __name__ == "__main__":
    sys.exit(run_main())
