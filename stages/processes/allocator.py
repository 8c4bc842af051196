"""Settings of this process's memory allocator."""

import ctypes
import platform

# malloc.h of glibc.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_MMAP_THRESHOLD_BYTES = 2**20
_TRIM_THRESHOLD_BYTES = 32 * 2**20


def return_freed_memory() -> None:
    """Make this process return large freed blocks to the system at once; does nothing off glibc.

    glibc raises its threshold for blocks of their own up to 32 MiB, the size of an image encoder's
    activations at 1024 pixels. Freed, they leave gaps in the heap that others do not fit into.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
