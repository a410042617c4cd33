"""Serves optuna-dashboard on the study of a run."""

import importlib.util
import shutil
import socketserver
import tempfile
from collections.abc import Callable
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from autotune.errors import ConfigError, InputMissingError, InterruptedRunError, UsageError


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A page asks for many things at once, and a browser keeps connections open."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its signature
        del format, args


def serve(study: Path, host: str, port: int, *, ready: Callable[[str], object]) -> None:
    """Serve a copy of the study until the process is asked to stop; `ready` gets the address.

    A copy, as the study follows from probes.jsonl and is written anew by the run, and as SQLite
    does not work on the network file systems that run directories are on.

    Raises:
        ConfigError: optuna-dashboard is not installed.
        InputMissingError: there is no study yet.
        UsageError: the address cannot be served.
    """
    if importlib.util.find_spec("optuna_dashboard") is None:
        msg = (
            "the dashboard needs the package optuna-dashboard, which is not installed: "
            "pip install 'autotune-launcher[dashboard]'"
        )
        raise ConfigError(msg)
    if not study.is_file():
        msg = f"{study} is not there: it is written when tuning ends or is stopped"
        raise InputMissingError(msg)
    with tempfile.TemporaryDirectory(prefix="autotune-dashboard-") as scratch:
        copy = Path(scratch) / study.name
        shutil.copyfile(study, copy)
        _serve(copy, host, port, ready)


def _serve(study: Path, host: str, port: int, ready: Callable[[str], object]) -> None:
    import optuna
    import optuna_dashboard

    application = optuna_dashboard.wsgi(optuna.storages.RDBStorage(f"sqlite:///{study}"))
    try:
        server = make_server(host, port, application, server_class=_Server, handler_class=_Quiet)
    except OSError as error:
        reason = error.strerror or error
        msg = f"cannot serve at {host}:{port}: {reason}; choose another --host or --port"
        raise UsageError(msg) from error
    with server:
        ready(f"http://{host}:{server.server_port}/dashboard/")
        try:
            server.serve_forever()
        except InterruptedRunError:
            # What ends it is no failure: nothing was left undone.
            return
