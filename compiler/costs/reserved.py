"""Memory of a device that is taken before any tensor of ours: its driver's, its libraries', and the
buffers of its links.

No allocator counts it, but for the workspaces, so that plans have it beside their peaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MIB = 2**20
SHARED = 8  # replicas that one machine may have, where nothing is known of machines


@dataclass(frozen=True)
class Reserved:
    """Bytes that a process takes of its device.

    Attributes:
        context: of CUDA, with the kernels that were loaded.
        workspaces: of matrix products.
        link: of a communicator for what one rank sends another, on the mean of its ends.
        group: of one for the replicas of a stage.
        peer: what that takes besides for each of the others in the same machine, as gradients go
            from each to each.
    """

    context: int = 0
    workspaces: int = 0
    link: int = 0
    group: int = 0
    peer: int = 0

    def parts(self, links: int, replicas: int, beside: int) -> Iterator[tuple[str, int]]:
        """What of a rank takes how much.

        Args:
            links: communicators for messages that the rank is an end of.
            replicas: of its stages.
            beside: how many of the others are in the same machine.
        """
        yield "CUDA context", self.context
        yield "workspaces of products", self.workspaces
        yield f"{links} communicators for messages", links * self.link
        if replicas > 1:
            yield f"1 for {replicas} replicas", self.group + beside * self.peer


NOTHING = Reserved()

# Context: 400 MB to 500 MB with lazily loaded kernels (PyTorch's developers in pytorch#107667 and
# #109888), and those that training loads. Workspaces: cuBLAS and cuBLASLt have one of 32 MiB each
# on Hopper (cuBLAS documentation, cublasSetWorkspace); before it PyTorch's
# CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8 and 4 MiB, of which GPUs below 24 GiB get 1 (pytorch#120925).
# Communicators, where NVLink gives NCCL 32 channels: 3.28 GB for all-to-all with seven others of a
# machine of H100s (nccl#1685), half of it for one direction; after collectives of a group 688 MB,
# 544 of two A100s (nccl#964). Over PCIe it has two channels for each, of 10 MiB at the end that
# receives and 2 MiB at the other, and few rings.
_NVLINK = {"link": 235 * 10**6, "group": 688 * 10**6, "peer": 469 * 10**6}
_PCIE = {"link": 12 * MIB, "group": 96 * MIB, "peer": 24 * MIB}

HOPPER = Reserved(512 * MIB, 64 * MIB, **_NVLINK)
AMPERE = Reserved(512 * MIB, 12 * MIB + 128 * 1024, **_NVLINK)
CARD = Reserved(448 * MIB, 9 * MIB + 128 * 1024, **_PCIE)
