"""One thread in every test's process, and in those it starts: results are then the same to the last
bit wherever they are compared, and processes do not wait for each other's threads.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported
