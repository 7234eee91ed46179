"""Shared test set-up: offline, without torchvision, tiny models with unequal axes; and cores shared out to processes."""

import os
import sys


# Before transformers is imported: nothing here may reach a network, and no test may depend on torchvision.
os.environ["HF_HUB_OFFLINE"] = "1"
sys.modules["torchvision"] = None  # type: ignore[assignment]

# Before torch is imported, and for the processes that tests start: of several processes of pytest-xdist each takes its share of
# the cores, because threads beyond the cores hold each other up.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    # Not with `train/processes.py`: the package is not to be imported here. macOS and Windows do not tell the usable cores.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
