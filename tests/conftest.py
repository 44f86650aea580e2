"""One thread for all of torch's arithmetic: with more, sums are taken in another order and comparisons to the last
digits depend on the load of the machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
