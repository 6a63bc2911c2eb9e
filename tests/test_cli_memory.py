"""The allocator of our programs: kept memory is not asked for again, and there is a way out."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from deformable_detr.cli import memory

FAULTS = """
import os, resource, sys
from deformable_detr.cli import commands, main

def build_parser():
    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            bytearray(48 << 20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    faults()
    print(faults())
    sys.exit(0)

commands.build_parser = build_parser
main()
"""
PAGES = 10 * (48 << 20) // os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
@pytest.mark.parametrize("setting", ["", "DEFORMABLE_DETR_MALLOC=default", "MALLOC_ARENA_MAX=2"])
def test_blocks_that_are_asked_for_again_cost_no_page_faults(setting):
    name, _, value = setting.partition("=")
    environment = os.environ | ({name: value} if name else {})
    environment["GLIBC_TUNABLES"] = "glibc.rtld.optional_static_tls=512"  # not the allocator's
    command = [sys.executable, "-c", FAULTS]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    faults = int(ended.stdout)
    # where the system gives large pages at once there are fewer faults than pages
    assert faults < 100 if not setting else faults > 100, ended.stderr


def test_other_allocators_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert memory.keep_memory() is False


def test_glibc_before_2_35_takes_less(monkeypatch):
    asked = []

    class Library:
        gnu_get_libc_version = None

        def mallopt(self, option, value):
            asked.append((option, value))
            return int(option != memory.MMAP_THRESHOLD or value <= 32 << 20)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    assert memory.keep_memory() is True
    assert asked == [(-3, 1 << 30), (-3, 32 << 20), (-1, 2**31 - 1)]
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_max=0")
    assert memory.keep_memory() is False
