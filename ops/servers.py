"""Settings of the two servers of ``make up``: addresses, credentials, and the environments of servers and clients."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from xmlrpc.client import ServerProxy

from ops.databases import MLFLOW, PREFECT
from ops.proxies import LOOPBACK
from ops.redaction import without_credentials
from ops.settings import PROJECT_ROOT, Settings

USER = "admin"
TAG_VARIABLE = "FINETUNE_UP"  # in the environment of all that `make up` started; its value is the servers' folder
EXPERIMENT = "finetune"  # in MLflow: of all runs
MODEL_TRAINING = "workflowType=machine_learning"  # in an address of MLflow 3: its pages for trainings, not for traces
TEMPORARY_SERVER_VARIABLE = "FINETUNE_TEMPORARY_SERVER"  # its value is the address of the server of `make run`
# Seconds; the value of PREFECT_FLOWS_HEARTBEAT_FREQUENCY wherever flow runs are started, and the smallest that
# Prefect allows. Three missed heartbeats make a flow run Crashed.
HEARTBEAT_SECONDS = 30
_PORT_ERRORS = (errno.EADDRINUSE, errno.EACCES)
_HOST_REMEDY = "set FINETUNE_HOST to an address of this machine"
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
# Variables of the user's shell that are not passed on: they would point the clients under `make up` to another
# server, or give them other credentials.
_NOT_PASSED_ON = (
    "PREFECT_PROFILE", "PREFECT_PROFILES_PATH", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING",
    "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "PREFECT_UI_API_URL",
    "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_RUN_ID",
)  # fmt: skip


@dataclass(frozen=True)
class Servers:
    """Settings of ``make up``, from its environment.

    Attributes:
        home: folder ``server`` in the data root, with databases, artifacts, logs and the password.
        host: FINETUNE_HOST, the address that both servers listen on; the loopback by default.
        prefect_port: FINETUNE_PREFECT_PORT, 4200 by default.
        mlflow_port: FINETUNE_MLFLOW_PORT, 5000 by default.
        secure: FINETUNE_SECURE, whether both servers require a password; by default if other machines can reach them.
        gpus: FINETUNE_GPUS, number of simultaneous trainings over all workers; by default the number of GPUs of this
            machine, at least 1.
    """

    home: Path
    host: str
    prefect_port: int
    mlflow_port: int
    secure: bool
    gpus: int

    @classmethod
    def load(cls) -> Servers:
        """Read the current environment.

        Raises:
            ValueError: a setting has a value that is not allowed; the message names it.
        """
        host = os.environ.get("FINETUNE_HOST") or "127.0.0.1"
        asked = (os.environ.get("FINETUNE_SECURE") or "").lower()
        if asked not in ("", *_YES, *_NO):
            raise ValueError(f"FINETUNE_SECURE={asked}: 1 requires a password, 0 does not")
        servers = cls(
            home=Settings.load().data_root / "server",
            host=host,
            prefect_port=_number("FINETUNE_PREFECT_PORT", 4200, 65535),
            mlflow_port=_number("FINETUNE_MLFLOW_PORT", 5000, 65535),
            secure=asked in _YES if asked else not _is_loopback(host),
            gpus=gpu_count(),
        )
        if servers.prefect_port == servers.mlflow_port:
            raise ValueError(f"FINETUNE_PREFECT_PORT and FINETUNE_MLFLOW_PORT are both {servers.prefect_port}")
        store = os.environ.get("MLFLOW_BACKEND_STORE_URI", "")
        if "://" in store and store.partition("://")[0].partition("+")[0] not in _DATABASES:
            # MLflow's server would write the whole address, with the password, into its log.
            raise ValueError(
                f"MLFLOW_BACKEND_STORE_URI={without_credentials(store)}: MLflow knows no such database, only "
                f"{', '.join(_DATABASES)}"
            )
        return servers

    @property
    def prefect_url(self) -> str:
        """Address of Prefect's server for clients on this machine."""
        return f"http://{self._client_host}:{self.prefect_port}"

    @property
    def mlflow_url(self) -> str:
        """Address of MLflow's server for clients on this machine."""
        return f"http://{self._client_host}:{self.mlflow_port}"

    @property
    def _client_host(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]" if ":" in host else host

    @property
    def logs(self) -> Path:
        """Folder with a log file for each process, of ten megabytes at most."""
        return self.home / "log"

    @property
    def client_file(self) -> Path:
        """File that a shell sources: addresses, number of GPUs, and credentials where a password is required."""
        return self.home / "client.env"

    @property
    def password_file(self) -> Path:
        """File with the password of both servers, readable by its owner only."""
        return self.home / "password"

    @property
    def socket(self) -> Path:
        """Socket on which supervisord takes commands from its owner. The kernel allows 107 bytes for its path."""
        path = self.home / "supervisor.sock"
        if len(os.fsencode(path)) <= 100:
            return path
        name = sha256(os.fsencode(self.home)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"finetune-{os.getuid()}-{name}.sock"

    def password(self) -> str:
        """The password of the user admin on both servers, generated at its first use.

        Raises:
            ValueError: the password file exists and is empty.
        """
        try:
            descriptor = os.open(self.password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            kept = self.password_file.read_text().strip()
            if not kept:
                raise ValueError(f"{self.password_file} is empty: remove it, and a new one is generated") from None
            return kept
        with open(descriptor, "w") as stream:
            stream.write(made := secrets.token_urlsafe(24))
        return made

    def client_environment(self) -> dict[str, str]:
        """The variables that every client of the two servers needs."""
        needed = {
            "PREFECT_API_URL": f"{self.prefect_url}/api",
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "FINETUNE_GPUS": str(self.gpus),  # a client can only count the GPUs of its own machine
        }
        if self.secure:
            needed |= {
                "PREFECT_API_AUTH_STRING": f"{USER}:{self.password()}",
                "MLFLOW_TRACKING_USERNAME": USER,
                "MLFLOW_TRACKING_PASSWORD": self.password(),
            }
        return needed

    def write_client_file(self) -> None:
        """Write ``client_file``, readable by its owner only."""
        lines = [f"export {name}={shlex.quote(value)}" for name, value in self.client_environment().items()]
        # A proxy that the shell names is for other servers (ops/proxies.py).
        hosts = ",".join(dict.fromkeys([self._client_host.strip("[]"), *LOOPBACK]))
        lines += [f'export {name}="${{{name}:+${name},}}{hosts}"' for name in ("NO_PROXY", "no_proxy")]
        with open(self.client_file, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
            os.fchmod(stream.fileno(), 0o600)
            stream.write("\n".join(lines) + "\n")

    def environment(self) -> dict[str, str]:
        """The environment of all processes that ``make up`` starts, flow runs included."""
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
        environment |= self.client_environment()
        environment |= {
            TAG_VARIABLE: str(self.home),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "FINETUNE_DATA_ROOT": str(self.home.parent),
            "FINETUNE_SOCKET": str(self.socket),
            "FINETUNE_MLFLOW_OPTIONS": "--app-name basic-auth" if self.secure else "",
            "DO_NOT_TRACK": "true",
            "PREFECT_HOME": str(self.home / "prefect"),
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
            "PREFECT_SERVER_API_HOST": self.host,
            "PREFECT_SERVER_API_PORT": str(self.prefect_port),
            "MLFLOW_HOST": self.host,
            "MLFLOW_PORT": str(self.mlflow_port),
        }
        if self.secure:
            environment |= {
                "PREFECT_SERVER_API_AUTH_STRING": f"{USER}:{self.password()}",
                "MLFLOW_AUTH_ADMIN_USERNAME": USER,
                "MLFLOW_AUTH_ADMIN_PASSWORD": self.password(),
                "MLFLOW_AUTH_CONFIG_PATH": str(PROJECT_ROOT / "mlflow" / "basic_auth.ini"),
                "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
            }
        # Prefect allows any origin by default: any page open in the user's browser could then start runs here.
        environment.setdefault("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", self.prefect_url)
        # Prefect's pages call PREFECT_API_URL by default, which is wrong on another machine or behind a proxy.
        environment.setdefault("PREFECT_SERVER_UI_API_URL", "/api")
        # Seconds between two queries of the worker; with Prefect's default of 10 a submitted run starts late.
        environment.setdefault("PREFECT_WORKER_QUERY_SECONDS", "2")
        # Values in the user's environment select another database or artifact store.
        environment.setdefault("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{self.home / 'mlflow.db'}")
        # As a URI, quoted: of a path MLflow would decode "%20", and keep the artifacts in another folder.
        environment.setdefault("MLFLOW_ARTIFACTS_DESTINATION", (self.home / "artifacts").as_uri())
        return environment

    def databases(self) -> dict[str, str]:
        """The addresses of the servers' databases, each with its owner."""
        environment = self.environment()
        prefect = f"sqlite:///{self.home / 'prefect' / 'prefect.db'}"
        found = {
            environment.get("PREFECT_SERVER_DATABASE_CONNECTION_URL") or prefect: PREFECT,
            environment["MLFLOW_BACKEND_STORE_URI"]: MLFLOW,
        }
        if self.secure:
            found[f"sqlite:///{self.home / 'basic_auth.db'}"] = MLFLOW
        return found

    def supervisor(self) -> Any:
        """supervisord's XML-RPC methods, such as ``stopProcess``; they raise OSError and xmlrpc.client's errors."""
        from supervisor.xmlrpc import SupervisorTransport

        transport = SupervisorTransport(None, None, f"unix://{self.socket}")
        return ServerProxy("http://127.0.0.1", transport=transport).supervisor

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the servers."""
        return _is_loopback(self.host)

    def taken_ports(self) -> list[str]:
        """A message for each port that cannot be listened on, with the setting to change."""
        taken = []
        for name, port in (("FINETUNE_PREFECT_PORT", self.prefect_port), ("FINETUNE_MLFLOW_PORT", self.mlflow_port)):
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((self.host, port))
                except OSError as error:
                    remedy = f"set {name}" if error.errno in _PORT_ERRORS else _HOST_REMEDY
                    taken.append(f"cannot listen on {self.host}:{port} ({error.strerror}): {remedy}")
        return taken


def gpu_count() -> int:
    """Number of simultaneous trainings: FINETUNE_GPUS, else the GPUs of this machine, at least one (the CPU).

    Raises:
        ValueError: FINETUNE_GPUS is not a whole number from 1 to 1024.
    """
    return _number("FINETUNE_GPUS", max(1, count_gpus()), 1024)


def count_gpus() -> int:
    """Number of GPUs that a training here can use, by nvidia-smi: importing torch to count them takes seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return len(re.findall(r"^GPU \d+:", listed, flags=re.MULTILINE))


def _number(name: str, default: int, most: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise ValueError(f"{name}={text}: a whole number from 1 to {most} is needed")
    return int(text)


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
