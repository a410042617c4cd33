"""`autotune detect`."""

from dataclasses import asdict
from typing import Any

import click

from autotune.cli.options import as_json, echo_json, resolve_options, shared
from autotune.units import format_bytes


@click.command(name="detect")
@shared("devices", "device_memory")
@as_json
def command(*, as_json: bool, **flags: Any) -> None:  # noqa: ANN401
    """Show the devices and what of them may be used."""
    from autotune.detect import detect

    options = resolve_options(flags, None)
    cluster = detect(options["devices"], options["device_memory"])
    if as_json:
        echo_json({"schema": 1, **asdict(cluster)})
        return
    host = cluster.host
    assert host is not None, "what was detected has a host"
    rows = [
        ("devices", f"{cluster.num_devices} x {cluster.device_name} ({cluster.kind})"),
        ("memory a device", format_bytes(cluster.device_memory_bytes)),
        ("  bound by", cluster.device_memory_source),
        ("threads a rank", str(cluster.threads_per_rank)),
        ("host", f"{host.cpu_name}, {host.sockets} sockets, {host.physical_cores} cores"),
        ("cores to use", str(host.usable_cores)),
        ("memory to use", f"{format_bytes(host.memory_bytes)} ({host.memory_source})"),
        ("memory available", format_bytes(host.available_bytes)),
    ]
    width = max(len(name) for name, _ in rows)
    click.echo("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows))
    for note in cluster.notes:
        click.echo(note, err=True)
