"""What benchmarks read of the machine they run on, and how they write down what they measured."""

import ctypes
import gc
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_coverage.inference.files import write_atomically

__all__ = ["peak_memory", "processors", "resident_memory", "settle_memory", "write_facts"]


def settle_memory() -> int:
    """Give free memory back, reset the peak (Linux only), and return the resident bytes."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_memory() -> int:
    """The most bytes that were resident since memory was settled."""
    return _status("VmHWM")


def resident_memory() -> int:
    """The bytes that are resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def processors() -> str:
    """The kind and number of processors."""
    return f"{platform.machine()}, {os.cpu_count()} processors"


def write_facts(file: Path, facts: Mapping[str, Any]) -> None:
    """Write what was measured as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, f"{json.dumps(facts, indent=2)}\n")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(value)
