"""Tests. Those marked ``gpu`` are asked for, ``pytest -m gpu``: no other one sees a GPU.

This stands before anything is imported that asks CUDA; processes of the tests inherit it.
"""

import os
import re
import sys

_asked = " ".join(sys.argv)
_wants_gpu = re.search(r"\bgpu\b", _asked) and "not gpu" not in _asked
if not _wants_gpu and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
