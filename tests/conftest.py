"""The environment of the tests and of the scripts that they start, set before anything imports torch or JAX."""

import atexit
import os
import shutil
import tempfile
from importlib import metadata

# One thread for each process: the networks of the tests are tiny, and threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# JAX programs compile longer than they compute: without optimization, and once for all tests that run the same one.
flags = "--xla_backend_optimization_level=0"
if metadata.version("jax").startswith("0.10."):  # a flag that another version does not know would end the process
    flags += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", flags)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
