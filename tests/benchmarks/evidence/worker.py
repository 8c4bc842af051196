"""What the processes of the runs import before they are forked, which takes seconds."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed  # noqa: F401

import tests.benchmarks.evidence.runs  # noqa: F401
