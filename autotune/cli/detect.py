"""`autotune detect`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from autotune.cli.launched import launched
from autotune.cli.options import as_json, echo_json, resolve_options, shared
from autotune.errors import UsageError
from autotune.hardware import Bench, Cluster
from autotune.units import format_bytes


@click.command(name="detect")
@shared("devices", "device_memory")
@click.option(
    "--bench", is_flag=True, help="Measure for some seconds what the devices really do; kept."
)
@click.option("--no-cache", is_flag=True, help="Measure anew, also if it was done before.")
@as_json
def command(*, bench: bool, no_cache: bool, as_json: bool, **flags: Any) -> None:  # noqa: ANN401
    """Show the devices and what of them may be used."""
    from autotune import intake

    if no_cache and not bench:
        msg = "--no-cache goes with --bench"
        raise UsageError(msg)
    options = resolve_options(flags, None)
    with launched(None) as nodes:
        cluster = nodes.detect(options["devices"], options["device_memory"])
        if bench:
            measured: Bench | None = intake.bench(cluster, anew=no_cache, nodes=nodes)
        else:
            measured = intake.read_bench(cluster)
        _show(cluster, measured, as_json=as_json)


def _show(cluster: Cluster, measured: Bench | None, *, as_json: bool) -> None:
    if as_json:
        document = {"schema": 1, **asdict(cluster)}
        if measured is not None:
            document["bench"] = asdict(measured) | {
                "matmul_flops_per_s": dict(measured.matmul_flops_per_s)
            }
        echo_json(document)
        return
    rows = _cluster_rows(cluster) + (_bench_rows(cluster, measured) if measured else [])
    width = max(len(name) for name, _ in rows)
    click.echo("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows))
    for note in (*cluster.notes, *filter(None, [cluster.unusable])):
        click.echo(note, err=True)


def _cluster_rows(cluster: Cluster) -> list[tuple[str, str]]:
    host = cluster.host
    assert host is not None, "what was detected has a host"
    return [
        ("devices", f"{cluster.num_devices} x {cluster.device_name} ({cluster.kind})"),
        *([("nodes", str(cluster.num_nodes))] if cluster.num_nodes > 1 else []),
        ("memory a device", format_bytes(cluster.device_memory_bytes)),
        ("  bound by", cluster.device_memory_source),
        *_device_rows(cluster),
        ("threads a rank", str(cluster.threads_per_rank)),
        ("host", f"{host.cpu_name}, {host.sockets} sockets, {host.physical_cores} cores"),
        ("cores to use", str(host.usable_cores)),
        ("memory to use", f"{format_bytes(host.memory_bytes)} ({host.memory_source})"),
        ("memory available", format_bytes(host.available_bytes)),
    ]


def _device_rows(cluster: Cluster) -> list[tuple[str, str]]:
    rows = []
    for rank, device in enumerate(cluster.devices):
        free = (
            "free not told"
            if device.free_bytes is None
            else f"{format_bytes(device.free_bytes)} free"
        )
        cpus = f", near CPUs {ranges(cluster.rank_cpus[rank])}" if cluster.rank_cpus else ""
        told = f"{device.name or 'of unknown name'}, {device.uuid or 'no UUID'}, {free}{cpus}"
        rows.append((f"  rank {rank}", f"GPU {device.index}: {told}"))
    links = cluster.links
    if links is not None and links.kind is not None:
        rate = links.peer_bytes_per_s
        named = {"nvlink": "NVLink", "pcie": "PCIe"}[links.kind]
        through = ", through host memory" if links.no_peer_access else ""
        rows.append(
            (
                "  linked by",
                named + (f", {rate / 1e9:.0f} GB/s a direction" if rate else "") + through,
            )
        )
    return rows


def ranges(numbers: Sequence[int]) -> str:
    """Write numbers as ranges: 0-3,8."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _bench_rows(cluster: Cluster, measured: Bench) -> list[tuple[str, str]]:
    rows = [
        (f"matrix products in {precision}", f"{flops / 1e9:,.1f} GFLOP/s a rank")
        for precision, flops in measured.matmul_flops_per_s
    ]
    rows.append(("memory bandwidth", f"{measured.memory_bytes_per_s / 1e9:.1f} GB/s a rank"))
    if measured.all_reduce_bytes_per_s is not None:
        sent = f"{measured.all_reduce_bytes_per_s / 1e9:.2f} GB/s sent by each of {measured.ranks}"
        rows.append(("all-reduce", sent))
        starting = f"{measured.collective_overhead_s * 1e6:.0f} us"
        rows.append(("starting a collective", starting))
    if cluster.has_separate_memory:
        rows += [
            ("device to host", f"{measured.host_link_bytes_per_s / 1e9:.1f} GB/s a rank"),
            ("host memory", f"{measured.host_memory_bytes_per_s / 1e9:.1f} GB/s a rank"),
        ]
    return [*rows, ("starting an operator", f"{measured.operator_overhead_s * 1e6:.1f} us")]
