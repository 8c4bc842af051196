"""The work itself: clips in, features, a trained student, videos out. `pipeline` drives it."""

import logging

# peft imports bitsandbytes wherever it is installed, which then warns, on CPUs with AVX512-BF16,
# that it has no fast kernel for 4-bit inference: nothing here computes in 4 bits. It is the only
# message of that module; every other warning of the library stays.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
