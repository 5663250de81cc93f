import os
import platform
import subprocess
import sys
from contextlib import contextmanager

import pytest

import recbole_mm
from recbole_mm import allocator, quick_start

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")

# tensors above 32 MB, which glibc gives back, made and dropped again and again
SCRIPT = """
import resource
import torch
from recbole_mm.allocator import keeping_freed_memory

torch.set_num_threads(1)

def pages():
    for _ in range(20):
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

print(pages())
with keeping_freed_memory():
    print(pages())
    large = [torch.ones(2**24) for _ in range(8)]
    del large
    kept = resident()
print(kept - resident())
"""


def pages_cleared(**variables):
    """By the kernel, without and with it; bytes given back at the end."""
    environment = {n: v for n, v in os.environ.items() if n not in allocator._VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment | variables,
        check=True,
        capture_output=True,
        text=True,
    )
    return tuple(map(int, done.stdout.split()))


def test_freed_memory_is_used_again_and_given_back_in_the_end():
    without, kept, given_back = pages_cleared()
    assert without >= 20 * 2**26 // 2**21  # the largest pages that a kernel clears at once
    assert kept < without / 10
    assert given_back >= 7 * 2**26


@pytest.mark.parametrize("variable", [{"GLIBC_TUNABLES": ""}, {"MALLOC_MMAP_MAX_": "65536"}])
def test_a_variable_of_the_users_counts(variable):
    without, still_without, _ = pages_cleared(**variable)
    assert still_without > without / 2


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.delattr(allocator.ctypes, "CDLL")
    with allocator.keeping_freed_memory():
        pass


@pytest.mark.parametrize(("model", "expected"), [("SASRec", 1), ("SASRecFast", 0)])
def test_runs_of_recboles_models_have_it(model, expected, monkeypatch):
    entered = []

    @contextmanager
    def counted():
        entered.append(model)
        yield

    monkeypatch.setattr(quick_start, "keeping_freed_memory", counted)
    quick = {"epochs": 1, "show_progress": False, "use_gpu": False}
    recbole_mm.run(model, "tiny", config_dict=quick, saved=False)
    assert len(entered) == expected
