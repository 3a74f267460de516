"""What a few cards have and can do at most, for planning without one.

Sources, the maker's papers: NVIDIA Ampere GA102 whitepaper (RTX 3090), Ada GPU architecture whitepaper
(RTX 4090), data sheets of A100 80GB SXM, H100 SXM, H200 SXM and L4. bf16 without sparsity, with fp32
accumulation (`chunkdist.models.flops`); memory as CUDA reports it; PCIe and NVLink one way, in theory.
"""

from __future__ import annotations

from dataclasses import dataclass

from chunkdist.models.flops import peak_flops

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU.

    Args:
        name: As `torch.cuda.get_device_name()` would have it.
        flops: bf16 FLOP/s.
        num_multiprocessors: How many blocks of a kernel's threads run at once, or half of that.
        memory_bytes: In all.
        bandwidth: Rate of its memory, bytes/s.
        host_bandwidth: Between its memory and the host's, one way, bytes/s.
        link_bandwidth: To other cards of the machine, one way, bytes/s.
    """

    name: str
    flops: float
    num_multiprocessors: int
    memory_bytes: int
    bandwidth: float
    host_bandwidth: float
    link_bandwidth: float


def _card(name: str, num_sms: int, gib: float, bandwidth: float, host: float, link: float) -> Card:
    flops = peak_flops(name)
    assert flops is not None
    return Card(
        name=name,
        flops=flops,
        num_multiprocessors=num_sms,
        memory_bytes=int(gib * GIB),
        bandwidth=bandwidth * 1e9,
        host_bandwidth=host * 1e9,
        link_bandwidth=link * 1e9,
    )


_PCIE_4, _PCIE_5 = 31.5, 63.0
CARDS: dict[str, Card] = {
    "rtx3090": _card("NVIDIA GeForce RTX 3090", 82, 23.6, 936, _PCIE_4, _PCIE_4),
    "rtx4090": _card("NVIDIA GeForce RTX 4090", 128, 23.6, 1008, _PCIE_4, _PCIE_4),
    "l4": _card("NVIDIA L4", 58, 22.0, 300, _PCIE_4, _PCIE_4),
    "a100": _card("NVIDIA A100-SXM4-80GB", 108, 79.2, 2039, _PCIE_4, 300),
    "h100": _card("NVIDIA H100 80GB HBM3", 132, 79.1, 3350, _PCIE_5, 450),
    "h200": _card("NVIDIA H200", 132, 139.8, 4800, _PCIE_5, 450),
}


def card_named(device_name: str) -> Card:
    """The card of a CUDA device; one that is not in the table counts as the slowest in it."""
    flops = peak_flops(device_name)
    alike = [card for card in CARDS.values() if card.flops == flops and flops is not None]
    return alike[-1] if alike else CARDS["rtx3090"]
