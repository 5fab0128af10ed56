"""One thread per test process: two of them fill the machine, and a forked worker inherits no OpenMP team."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start

import torch

torch.set_num_threads(1)
