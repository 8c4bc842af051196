"""Stages of the pipeline: feature extraction from clips, training, sampling and inspection."""

import logging

# peft imports bitsandbytes if it is installed, which on CPUs with AVX512-BF16 warns that it has no
# fast kernel for 4-bit inference. Nothing here uses 4-bit inference. The module logs no other
# message; all other warnings of the library are kept.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
