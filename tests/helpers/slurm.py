"""A Slurm cluster on the loopback for tests: munged, slurmctld and two slurmd of Debian's packages."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from made_up import end_daemons, free_ports, wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel")
NODES = ("node1", "node2")
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=30
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """A cluster of two nodes, both this machine. All its daemons are ended afterwards.

    Args:
        folder: an empty folder with a short path, for a socket is in it.

    Yields:
        The environment variables that its commands need.
    """
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        pytest.skip(f"{', '.join(missing)} not installed (apt-get install slurmctld slurmd slurm-client munge)")
    if os.getuid() != 0:
        pytest.skip("slurmd needs root")
    for name in ("state", "munge", *NODES):
        (folder / name).mkdir(mode=0o700)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    configuration = folder / "slurm.conf"
    configuration.write_text(_CONFIGURATION.format(host=host, folder=folder, ports=free_ports(3)))
    variables = {"SLURM_CONF": str(configuration)}
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *command: str) -> None:
        with (folder / f"{name}.out").open("wb") as log:
            started.append(subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=log))

    def states() -> list[str]:
        shown = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%T"], env=os.environ | variables, capture_output=True, text=True
        )
        return shown.stdout.split()

    try:
        files = [f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
        start("munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        wait_for("munged", (folder / "munge.socket").exists, 10)
        start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            start(node, "slurmd", "-D", "-N", node)
        wait_for("two idle nodes", lambda: states() == ["idle", "idle"], 60)
        yield variables
    finally:
        end_daemons(started)
