"""`autotune doctor`."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from autotune.cli.options import as_json, echo_json, resolve_options, shared

if TYPE_CHECKING:
    from autotune.doctor import Examination

_MARKS = {"ok": "ok", "warning": "warn", "failed": "FAIL", "skipped": "skip"}


@click.command(name="doctor")
@shared("devices", "device_memory", "run_dir")
@click.option("--no-build", is_flag=True, help="Do not build or load DeepSpeed's ops.")
@as_json
def command(*, no_build: bool, as_json: bool, **flags: object) -> None:
    """Examine this machine: what a run needs, what is missing, and how to mend it.

    Exits with the code of what has failed first; 0 if a run can be started.
    """
    from autotune.doctor import examine

    options = resolve_options(flags, None)
    with tempfile.TemporaryDirectory(prefix="autotune-doctor-") as scratch:
        found = examine(options, Path(scratch), build=not no_build)
    if as_json:
        echo_json(found.to_json())
    else:
        click.echo(_text(found))
    if found.exit_code:
        raise click.exceptions.Exit(found.exit_code)


def _text(found: "Examination") -> str:
    lines: list[str] = []
    for group in dict.fromkeys(check.group for check in found.checks):
        lines.append(group)
        for check in found.checks:
            if check.group != group:
                continue
            lines.append(f"  {_MARKS[check.status].ljust(4)}  {check.name}: {check.found}")
            if check.advice:
                lines.append(f"        {check.advice}")
    failed = sum(check.status == "failed" for check in found.checks)
    warned = sum(check.status == "warning" for check in found.checks)
    verdict = "a run can be started" if not failed else "a run would fail"
    lines += ["", f"{verdict}: {failed} failed, {warned} to look at", "", "for a bug report:"]
    return "\n".join([*lines, "", "```", *found.report(), "```"])
