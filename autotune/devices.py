"""Known GPUs: what their makers state, by exact name.

Sources, one a line of the table: the product's data sheet for arithmetic (dense, without sparsity;
consumer cards with fp32 accumulation), memory bandwidth and link, and for `memory_bytes` the total
that torch and NVML show, which is less than the size on the box where error correction or the
driver takes a part. A device that is not in the table is measured, never guessed.
"""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from autotune.errors import UsageError
from autotune.hardware import Cluster, Links, Rates

_TERA = 1e12
_GIGA = 1e9
_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What is published of a GPU.

    Attributes:
        name: KIND-MEMORY, the short name.
        products: names that NVML or the maker's tools show.
        memory_bytes: what a process can see.
        half_flops_per_s: matrix multiplication in bf16, or in fp16 where there is no bf16.
        single_flops_per_s: fp32 without reduced-precision matrix units.
        memory_bytes_per_s: bandwidth of the device's memory.
        peer_bytes_per_s: one direction between two devices of a node: NVLink, or PCIe.
        host_bytes_per_s: one direction between device and host: PCIe.
        compute_capability: of NVIDIA devices.
    """

    name: str
    products: tuple[str, ...]
    memory_bytes: int
    half_flops_per_s: float
    single_flops_per_s: float
    memory_bytes_per_s: float
    peer_bytes_per_s: float
    host_bytes_per_s: float
    compute_capability: tuple[int, int] | None


_PCIE3, _PCIE4, _PCIE5 = 16.0, 32.0, 64.0
"""Gigabytes a second and direction of a slot of sixteen lanes (PCI-SIG)."""


def _gpu(  # noqa: PLR0917 - a row of the table below
    name: str,
    mib: int,
    half: float,
    single: float,
    memory: float,
    peer: float,
    host: float,
    capability: tuple[int, int] | None,
    *products: str,
) -> Gpu:
    return Gpu(
        name=name,
        products=products,
        memory_bytes=mib * _MIB,
        half_flops_per_s=half * _TERA,
        single_flops_per_s=single * _TERA,
        memory_bytes_per_s=memory * _GIGA,
        peer_bytes_per_s=peer * _GIGA,
        host_bytes_per_s=host * _GIGA,
        compute_capability=capability,
    )


# name, MiB, half TFLOP/s, single TFLOP/s, memory GB/s, peer GB/s, host GB/s, capability, products
GPUS: tuple[Gpu, ...] = (
    # NVIDIA Tesla P100 data sheet, 2016
    _gpu("P100-16GB", 16276, 21.2, 10.6, 732, 80, _PCIE3, (6, 0), "Tesla P100-SXM2-16GB"),
    # NVIDIA V100 data sheet, 2020
    _gpu("V100-16GB", 16151, 125, 15.7, 900, 150, _PCIE3, (7, 0), "Tesla V100-SXM2-16GB"),
    _gpu("V100-32GB", 32501, 125, 15.7, 900, 150, _PCIE3, (7, 0), "Tesla V100-SXM2-32GB"),
    # NVIDIA T4 data sheet, 2019
    _gpu("T4-16GB", 15095, 65, 8.1, 320, _PCIE3, _PCIE3, (7, 5), "Tesla T4"),
    # NVIDIA Turing architecture white paper, 2018
    _gpu(
        "RTX2080Ti-11GB",
        11011,
        53.8,
        13.4,
        616,
        _PCIE3,
        _PCIE3,
        (7, 5),
        "NVIDIA GeForce RTX 2080 Ti",
    ),
    # NVIDIA Ampere GA102 white paper, 2021
    _gpu("RTX3080-10GB", 10018, 59.5, 29.8, 760, _PCIE4, _PCIE4, (8, 6), "NVIDIA GeForce RTX 3080"),
    _gpu("RTX3090-24GB", 24253, 71, 35.6, 936, _PCIE4, _PCIE4, (8, 6), "NVIDIA GeForce RTX 3090"),
    _gpu("A40-48GB", 45416, 149.7, 37.4, 696, _PCIE4, _PCIE4, (8, 6), "NVIDIA A40"),
    _gpu("A6000-48GB", 48662, 154.8, 38.7, 768, _PCIE4, _PCIE4, (8, 6), "NVIDIA RTX A6000"),
    _gpu("A5000-24GB", 24247, 111.1, 27.8, 768, _PCIE4, _PCIE4, (8, 6), "NVIDIA RTX A5000"),
    # NVIDIA A10, A30, A100 data sheets, 2021 and 2022; the A10G is the A10 of one cloud
    _gpu("A10-24GB", 22588, 125, 31.2, 600, _PCIE4, _PCIE4, (8, 6), "NVIDIA A10", "NVIDIA A10G"),
    _gpu("A30-24GB", 24062, 165, 10.3, 933, 100, _PCIE4, (8, 0), "NVIDIA A30"),
    _gpu(
        "A100-40GB",
        40338,
        312,
        19.5,
        1555,
        300,
        _PCIE4,
        (8, 0),
        "NVIDIA A100-SXM4-40GB",
        "A100-SXM4-40GB",
        "NVIDIA A100-PCIE-40GB",
    ),
    _gpu(
        "A100-80GB",
        81154,
        312,
        19.5,
        2039,
        300,
        _PCIE4,
        (8, 0),
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA A100 80GB PCIe",
    ),
    _gpu("A800-80GB", 81154, 312, 19.5, 2039, 200, _PCIE4, (8, 0), "NVIDIA A800-SXM4-80GB"),
    # NVIDIA Ada architecture white paper, 2022; L4, L40 and L40S data sheets, 2023
    _gpu("RTX4080-16GB", 16070, 97.5, 48.7, 717, _PCIE4, _PCIE4, (8, 9), "NVIDIA GeForce RTX 4080"),
    _gpu(
        "RTX4090-24GB", 24217, 165.2, 82.6, 1008, _PCIE4, _PCIE4, (8, 9), "NVIDIA GeForce RTX 4090"
    ),
    _gpu("L4-24GB", 22563, 121, 30.3, 300, _PCIE4, _PCIE4, (8, 9), "NVIDIA L4"),
    _gpu("L40-48GB", 45416, 181, 90.5, 864, _PCIE4, _PCIE4, (8, 9), "NVIDIA L40"),
    _gpu("L40S-48GB", 45488, 362, 91.6, 864, _PCIE4, _PCIE4, (8, 9), "NVIDIA L40S"),
    # NVIDIA H100, H200, H20 data sheets, 2023 and 2024
    _gpu("H100-80GB", 81090, 989, 67, 3350, 450, _PCIE5, (9, 0), "NVIDIA H100 80GB HBM3"),
    _gpu("H800-80GB", 81090, 989, 67, 3350, 200, _PCIE5, (9, 0), "NVIDIA H800"),
    _gpu("H20-96GB", 97260, 148, 44, 4000, 450, _PCIE5, (9, 0), "NVIDIA H20"),
    _gpu("H200-141GB", 143167, 989, 67, 4800, 450, _PCIE5, (9, 0), "NVIDIA H200"),
    # NVIDIA Blackwell data sheet, 2024, and RTX Blackwell white paper, 2025
    _gpu("B200-180GB", 182632, 2250, 75, 8000, 900, _PCIE5, (10, 0), "NVIDIA B200"),
    _gpu(
        "RTX5090-32GB",
        32112,
        209.5,
        104.8,
        1792,
        _PCIE5,
        _PCIE5,
        (12, 0),
        "NVIDIA GeForce RTX 5090",
    ),
    # AMD Instinct data sheets, 2021 to 2023; an MI250X shows two devices, this is one of them
    _gpu("MI210-64GB", 65520, 181, 22.6, 1638, 100, _PCIE4, None, "AMD Instinct MI210"),
    _gpu("MI250X-64GB", 65520, 191.5, 23.9, 1638, 100, _PCIE4, None, "AMD Instinct MI250X"),
    _gpu("MI300X-192GB", 196592, 1307, 163.4, 5300, 448, _PCIE5, None, "AMD Instinct MI300X"),
)

COMPARED = (
    "RTX3090-24GB",
    "RTX4090-24GB",
    "A10-24GB",
    "L40S-48GB",
    "A100-40GB",
    "A100-80GB",
    "H100-80GB",
    "H200-141GB",
)
"""Kinds that are compared if none is named: what clouds and workstations have most of."""

_NODE_GPUS = 8
"""Devices that the usual node has at most."""

_BY_NAME = {alias.casefold(): gpu for gpu in GPUS for alias in (gpu.name, *gpu.products)}


def find_gpu(name: str) -> Gpu:
    """Find a GPU by product name or short name, in any case.

    Raises:
        UsageError: it is not in the table; the message has the nearest names that are.
    """
    gpu = _BY_NAME.get(name.casefold())
    if gpu is None:
        nearest = difflib.get_close_matches(name.casefold(), _BY_NAME, n=3, cutoff=0.0)
        known = ", ".join(dict.fromkeys(_BY_NAME[alias].name for alias in nearest))
        msg = f"no GPU is known as {name!r}; the nearest are {known}"
        raise UsageError(msg)
    return gpu


def known_gpu(product: str) -> Gpu | None:
    """Return the GPU of a product's name, in any case; None if it is not in the table."""
    return _BY_NAME.get(product.casefold())


def canonical_name(product: str) -> str:
    """Return the short name of a known product, and any other name as it is."""
    gpu = known_gpu(product)
    return gpu.name if gpu else product


@dataclass(frozen=True, slots=True)
class NodeGpus:
    """So many alike GPUs in one node."""

    count: int
    gpu: Gpu


def parse_gpus(text: str) -> NodeGpus:
    """Read COUNTxNAME, for instance 8xRTX3090-24GB; without a count it is one.

    Raises:
        UsageError: the count is no whole number above zero, or the name is not known.
    """
    match = re.fullmatch(r"(?:(\d+)\s*[x*])?\s*(.+)", text.strip(), re.IGNORECASE)
    if match is None:
        msg = "--gpus names no GPU: write COUNTxNAME, for instance 8xRTX3090-24GB"
        raise UsageError(msg)
    count = int(match[1] or 1)
    if count < 1:
        msg = f"--gpus {text}: the count must be at least 1"
        raise UsageError(msg)
    return NodeGpus(count=count, gpu=find_gpu(match[2].strip()))


def parse_kinds(text: str) -> tuple[Gpu, ...]:
    """Read names of GPUs, separated by commas.

    Raises:
        UsageError: one is not known, or has a count.
    """
    kinds = []
    for name in text.split(","):
        if re.match(r"\s*\d+\s*[x*]", name, re.IGNORECASE):
            msg = f"--gpus {name.strip()}: with --matrix the counts are those of --counts"
            raise UsageError(msg)
        kinds.append(find_gpu(name.strip()))
    return tuple(kinds)


def in_nodes(gpu: Gpu, count: int) -> tuple[NodeGpus, ...]:
    """Return so many GPUs in nodes of eight, the last with the rest."""
    whole, rest = divmod(count, _NODE_GPUS)
    full = (NodeGpus(_NODE_GPUS, gpu),) * whole
    return (*full, NodeGpus(rest, gpu)) if rest else full


ACHIEVED_ARITHMETIC = 0.6
"""Share of the stated matrix rate that fine-tuning reaches. Published runs of 3 to 13 B models in
bf16, recomputation counted: 0.59 (torchtune, A100), 0.62 (xtuner, A100), 0.58 to 0.78 (llm-foundry,
H100 and A100)."""

_ACHIEVED_BANDWIDTH = 0.8
NODE_NETWORK_BYTES_PER_S = 25 * _GIGA
"""Assumed between nodes: 200 Gbit/s and direction a node, shared by its devices."""
_HOST_MEMORY_BYTES_PER_S = 150 * _GIGA
"""Assumed of a host: eight channels of DDR4-3200 at three quarters, shared by its devices."""
_LAUNCH_S = 5e-6
"""Time that starting an operator takes on a GPU; CUDA's launch overhead is a few microseconds."""
_MEETING_S = 3e-5
"""Assumed of a collective of next to nothing within a node: `detect --bench` measures it."""
_HOP_S, _NODE_HOP_S = 1.9e-6, 4e-6
"""What each rank, and each node, adds to a collective of all by a ring, as one after the other
passes it on. NCCL's own figures, by which it chooses how to go (hwLat of its graph/tuning.cc: ring,
protocol LL128, NVLink and network)."""


def named_cluster(
    gpus: Sequence[NodeGpus], nodes: int = 1, memory_cap_bytes: int | None = None
) -> Cluster:
    """Return the cluster of the named GPUs: a node an entry, or `nodes` alike.

    In unlike nodes the smallest device counts, as every rank does the same.
    """
    counts = _counts(gpus, nodes)
    smallest = min((node.gpu for node in gpus), key=lambda gpu: gpu.memory_bytes)
    memory_bytes = min(smallest.memory_bytes, memory_cap_bytes or smallest.memory_bytes)
    unlike = len({node.gpu.name for node in gpus}) > 1
    return Cluster(
        kind="cuda",
        device_name=smallest.name,
        num_devices=sum(counts),
        device_memory_bytes=memory_bytes,
        device_memory_source=f"a {smallest.name}, as it shows itself to a process",
        threads_per_rank=1,
        compute_capability=smallest.compute_capability,
        visible_devices=(),
        host=None,
        notes=(f"nodes are unlike: every device counts as a {smallest.name}",) if unlike else (),
        num_nodes=len(counts),
        devices_per_node=math.gcd(*counts) if len(counts) > 1 else 0,
    )


def _counts(gpus: Sequence[NodeGpus], nodes: int) -> list[int]:
    return [node.count for node in gpus] * (nodes if len(gpus) == 1 else 1)


def named_rates(
    gpus: Sequence[NodeGpus],
    nodes: int,
    precision: str,
    network_bytes_per_s: float = NODE_NETWORK_BYTES_PER_S,
    links: Links | None = None,
) -> Rates:
    """Return what a rank of the named GPUs may reach, from the table; nothing here is measured.

    A ring through all ranks enters and leaves each node once, so that it has the node's network to
    itself, and goes at the rate of that or of the devices' own links, whichever is less.
    Of `links` that were found what they tell goes before the table.
    """
    slowest = min((node.gpu for node in gpus), key=lambda gpu: gpu.half_flops_per_s)
    counts = _counts(gpus, nodes)
    flops = slowest.single_flops_per_s if precision == "fp32" else slowest.half_flops_per_s
    host_link = (links and links.host_bytes_per_s) or slowest.host_bytes_per_s
    slowest_peer = min(_peer_bytes_per_s(node.gpu, host_link) for node in gpus)
    peer = (links and links.peer_bytes_per_s) or slowest_peer
    link = _ACHIEVED_BANDWIDTH * peer
    network = _ACHIEVED_BANDWIDTH * network_bytes_per_s
    several, hops = len(counts) > 1, sum(counts) - len(counts)
    return Rates(
        matmul_flops_per_s=ACHIEVED_ARITHMETIC * flops,
        memory_bytes_per_s=_ACHIEVED_BANDWIDTH * slowest.memory_bytes_per_s,
        link_bytes_per_s=min(link, network) if several else link,
        host_link_bytes_per_s=_ACHIEVED_BANDWIDTH * host_link,
        host_memory_bytes_per_s=_HOST_MEMORY_BYTES_PER_S / max(counts),
        operator_overhead_s=_LAUNCH_S,
        collective_overhead_s=(
            _MEETING_S + several * (hops * _HOP_S + (len(counts) - 1) * _NODE_HOP_S)
        ),
        node_link_bytes_per_s=link if several else None,
        node_collective_overhead_s=_MEETING_S if several else None,
    )


def _peer_bytes_per_s(gpu: Gpu, host_link_bytes_per_s: float) -> float:
    """Return what peers exchange: those that have no link of their own, no more than their slot."""
    if gpu.peer_bytes_per_s > gpu.host_bytes_per_s:
        return gpu.peer_bytes_per_s
    return min(gpu.peer_bytes_per_s, host_link_bytes_per_s)
