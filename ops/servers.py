"""The two servers of ``make up``: where they listen, and what they and their clients find in the environment."""

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

from ops.settings import PROJECT_ROOT, Settings

USER = "admin"
TAG_VARIABLE = "FINETUNE_UP"  # in the environment of all that `make up` started; its value is the servers' folder
# What PREFECT_FLOWS_HEARTBEAT_FREQUENCY must be where flow runs are started, and Prefect's least; three missed beats
# make a run Crashed.
HEARTBEAT_SECONDS = 30
_PORT_ERRORS = (errno.EADDRINUSE, errno.EACCES)
_HOST_WAY_OUT = "set FINETUNE_HOST to an address of this machine"
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
# Of the user's shell: they would send the servers' own clients elsewhere, or with other credentials.
_FOREIGN = (
    "PREFECT_PROFILE", "PREFECT_PROFILES_PATH", "PREFECT_API_KEY", "PREFECT_API_AUTH_STRING",
    "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE", "PREFECT_UI_API_URL",
    "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_RUN_ID",
)  # fmt: skip


@dataclass(frozen=True)
class Servers:
    """Settings of ``make up``, from its environment.

    Attributes:
        home: ``server`` in the data root: databases, artifacts, logs, the password.
        host: FINETUNE_HOST; the address that both servers listen on, loopback by default.
        prefect_port: FINETUNE_PREFECT_PORT.
        mlflow_port: FINETUNE_MLFLOW_PORT.
        secure: FINETUNE_SECURE; both servers ask for a password. The default where others can reach them.
        gpus: FINETUNE_GPUS; trainings at a time over all workers. Default: the GPUs of this machine, at least 1.
    """

    home: Path
    host: str
    prefect_port: int
    mlflow_port: int
    secure: bool
    gpus: int

    @classmethod
    def load(cls) -> Servers:
        """Read the environment now.

        Raises:
            ValueError: a setting is not what it must be; the message names it.
        """
        host = os.environ.get("FINETUNE_HOST") or "127.0.0.1"
        asked = (os.environ.get("FINETUNE_SECURE") or "").lower()
        if asked not in ("", *_YES, *_NO):
            raise ValueError(f"FINETUNE_SECURE={asked}: 1 asks for a password, 0 for none")
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
        return servers

    @property
    def prefect_url(self) -> str:
        """Prefect's pages, as this machine reaches them."""
        return f"http://{self._reach}:{self.prefect_port}"

    @property
    def mlflow_url(self) -> str:
        """MLflow's pages, as this machine reaches them."""
        return f"http://{self._reach}:{self.mlflow_port}"

    @property
    def _reach(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"[{host}]" if ":" in host else host

    @property
    def logs(self) -> Path:
        """What the processes print, a file each, ten megabytes at most."""
        return self.home / "log"

    @property
    def client_file(self) -> Path:
        """For a shell to source: the addresses, the number of GPUs, and the credentials if there are any."""
        return self.home / "client.env"

    @property
    def password_file(self) -> Path:
        """The password of both servers, readable by its owner alone."""
        return self.home / "password"

    @property
    def socket(self) -> Path:
        """Where supervisord takes orders from its owner. The kernel allows 107 bytes for its path."""
        path = self.home / "supervisor.sock"
        if len(os.fsencode(path)) <= 100:
            return path
        name = sha256(os.fsencode(self.home)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"finetune-{os.getuid()}-{name}.sock"

    def password(self) -> str:
        """The password of the user admin on both servers, made at first use.

        Raises:
            ValueError: the file is there, and empty.
        """
        try:
            descriptor = os.open(self.password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            kept = self.password_file.read_text().strip()
            if not kept:
                raise ValueError(f"{self.password_file} is empty: remove it, and a new password is made") from None
            return kept
        with open(descriptor, "w") as stream:
            stream.write(made := secrets.token_urlsafe(24))
        return made

    def client_environment(self) -> dict[str, str]:
        """What every client of the two servers needs."""
        needed = {
            "PREFECT_API_URL": f"{self.prefect_url}/api",
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "FINETUNE_GPUS": str(self.gpus),  # who counts its own does not know those of other machines
        }
        if self.secure:
            needed |= {
                "PREFECT_API_AUTH_STRING": f"{USER}:{self.password()}",
                "MLFLOW_TRACKING_USERNAME": USER,
                "MLFLOW_TRACKING_PASSWORD": self.password(),
            }
        return needed

    def write_client_file(self) -> None:
        """Write `client_file`, readable by its owner alone."""
        lines = [f"export {name}={shlex.quote(value)}" for name, value in self.client_environment().items()]
        with open(self.client_file, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
            os.fchmod(stream.fileno(), 0o600)
            stream.write("\n".join(lines) + "\n")

    def environment(self) -> dict[str, str]:
        """The environment of everything that ``make up`` starts, flow runs included."""
        environment = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
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
        # Any origin by default: whatever page the user's browser has open could then start runs here.
        environment.setdefault("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", self.prefect_url)
        # PREFECT_API_URL by default, which on another machine or behind a proxy is not where the page came from.
        environment.setdefault("PREFECT_SERVER_UI_API_URL", "/api")
        # Every 10 s by default; a run that was just submitted need not wait so long.
        environment.setdefault("PREFECT_WORKER_QUERY_SECONDS", "2")
        # Other databases and stores may be named in the environment.
        environment.setdefault("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{self.home / 'mlflow.db'}")
        environment.setdefault("MLFLOW_ARTIFACTS_DESTINATION", str(self.home / "artifacts"))
        return environment

    def supervisor(self) -> Any:
        """supervisord's commands, such as ``stopProcess``; they raise OSError and the errors of `xmlrpc.client`."""
        from supervisor.xmlrpc import SupervisorTransport

        transport = SupervisorTransport(None, None, f"unix://{self.socket}")
        return ServerProxy("http://127.0.0.1", transport=transport).supervisor

    @property
    def is_local(self) -> bool:
        """Nobody but this machine reaches the servers."""
        return _is_loopback(self.host)

    def taken_ports(self) -> list[str]:
        """The ports that cannot be listened on, each with the setting that helps."""
        taken = []
        for name, port in (("FINETUNE_PREFECT_PORT", self.prefect_port), ("FINETUNE_MLFLOW_PORT", self.mlflow_port)):
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((self.host, port))
                except OSError as error:
                    way_out = f"set {name}" if error.errno in _PORT_ERRORS else _HOST_WAY_OUT
                    taken.append(f"cannot listen on {self.host}:{port} ({error.strerror}): {way_out}")
        return taken


def gpu_count() -> int:
    """Trainings at a time: FINETUNE_GPUS, else the GPUs of this machine, at least one (the CPU).

    Raises:
        ValueError: FINETUNE_GPUS is no positive number.
    """
    return _number("FINETUNE_GPUS", max(1, count_gpus()), 1024)


def count_gpus() -> int:
    """GPUs that a training here could use, as nvidia-smi lists them: torch would take seconds to say the same."""
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
