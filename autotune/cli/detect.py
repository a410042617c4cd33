"""`autotune detect`."""

from dataclasses import asdict
from typing import Any

import click

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
    from autotune.detect import detect

    if no_cache and not bench:
        msg = "--no-cache goes with --bench"
        raise UsageError(msg)
    options = resolve_options(flags, None)
    cluster = detect(options["devices"], options["device_memory"])
    measured = intake.bench(cluster, anew=no_cache) if bench else intake.read_bench(cluster)
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
    for note in cluster.notes:
        click.echo(note, err=True)


def _cluster_rows(cluster: Cluster) -> list[tuple[str, str]]:
    host = cluster.host
    assert host is not None, "what was detected has a host"
    return [
        ("devices", f"{cluster.num_devices} x {cluster.device_name} ({cluster.kind})"),
        ("memory a device", format_bytes(cluster.device_memory_bytes)),
        ("  bound by", cluster.device_memory_source),
        ("threads a rank", str(cluster.threads_per_rank)),
        ("host", f"{host.cpu_name}, {host.sockets} sockets, {host.physical_cores} cores"),
        ("cores to use", str(host.usable_cores)),
        ("memory to use", f"{format_bytes(host.memory_bytes)} ({host.memory_source})"),
        ("memory available", format_bytes(host.available_bytes)),
    ]


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
