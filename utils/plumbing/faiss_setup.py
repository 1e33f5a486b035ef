"""
FAISS, imported so that it is fast on this processor: `from utils.plumbing.faiss_setup import faiss`.
"""

import os
import platform
import re
from pathlib import Path

import psutil


def name_blas_kernel(cpuinfo="/proc/cpuinfo"):
    """Name OpenBLAS's kernel by the processor's flags, before faiss is imported; a user's choice is kept."""
    # why: the OpenBLAS in the faiss-cpu wheel does not know every processor; its fallback was 5x slower
    if platform.machine() in ("x86_64", "AMD64") and Path(cpuinfo).is_file():
        line = re.search(r"^flags\s*:(.*)|\Z", Path(cpuinfo).read_text(encoding="utf-8"), re.M)
        flags = set(line[0].split())
        if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags:
            os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")
        elif {"avx2", "fma"} <= flags:
            os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")


name_blas_kernel()
import faiss  # noqa: E402  (after its kernel has a name)

# why: two hyper-threads on one core slow a matrix product down (faiss issue 2953: 58 s became 1 h 43)
ALLOWED = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
if "OMP_NUM_THREADS" not in os.environ:
    faiss.omp_set_num_threads(min(psutil.cpu_count(logical=False) or ALLOWED, ALLOWED))
