"""Settings that all tests share."""

import os

# Workers that share the cores must not each start a thread for every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
