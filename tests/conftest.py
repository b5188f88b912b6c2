"""One thread for each process: the networks of the tests are tiny, and threads would wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
