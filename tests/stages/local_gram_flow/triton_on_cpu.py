"""Runs the Triton kernel by Triton's interpreter on the cases of a file; its tests start it.

A process of its own, since Triton reads TRITON_INTERPRET where it is first imported.

    TRITON_INTERPRET=1 python triton_on_cpu.py CASES.pt FOUND.pt
"""

import sys

import torch

from stages.local_gram_flow import triton_cosines


def main() -> None:
    triton_cosines._TOKENS = 16
    found = {}
    for name, (features, upstream, radius) in torch.load(sys.argv[1], weights_only=True).items():
        leaf = features.requires_grad_()
        flow = triton_cosines.TritonWindowCosines.apply(leaf, radius, 1e-12)
        flow.backward(upstream)
        found[name] = (flow.detach(), leaf.grad)
    torch.save(found, sys.argv[2])


if __name__ == "__main__":
    main()
