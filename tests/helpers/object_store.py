"""An S3-compatible store for tests: the gateway of Ceph (Debian's radosgw) on a cluster of one monitor and one disk.

The disk is memory. The gateway is one that people run in production: it checks signatures and takes uploads in parts.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
from made_up import end_daemons, free_ports, wait_for

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool", "ceph")
BUCKET, USER, PASSWORD = "mlflow", "finetune", "object-store-secret"
_CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{port}/0]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr1 = false
ms mon client mode = crc
auth cluster required = none
auth service required = none
auth client required = none
mon allow pool size one = true
mon max pg per osd = 1000
mon data = {folder}/mon
mon data avail crit = 1
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 2147483648
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
rgw data = {folder}/rgw
run dir = {folder}
admin socket = {folder}/$name.$pid.socket
log file = {folder}/$name.log
pid file = {folder}/$name.pid
"""


@contextmanager
def object_store(folder: Path) -> Iterator[dict[str, str]]:
    """A store with an empty bucket. All its daemons are ended afterwards.

    Args:
        folder: an empty folder with a short path, for sockets are in it.

    Yields:
        The environment variables of its clients: address and credentials.
    """
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        pytest.skip(f"{', '.join(missing)} not installed (apt-get install radosgw ceph-mon ceph-osd)")
    if not importlib.util.find_spec("boto3"):
        pytest.skip("boto3 is not installed (pip install -c constraints.txt -e '.[s3]')")
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()
    monitor, gateway = free_ports(2)
    fsid, disk = str(uuid.uuid4()), str(uuid.uuid4())
    (folder / "ceph.conf").write_text(_CONFIGURATION.format(fsid=fsid, port=monitor, folder=folder))
    environment = os.environ | {"CEPH_CONF": str(folder / "ceph.conf")}
    started: list[subprocess.Popen[bytes]] = []

    def call(*command: str) -> None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(*command: str) -> None:
        with (folder / f"{command[0]}.out").open("wb") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    try:
        monitor_map = str(folder / "map")
        call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{monitor}]", monitor_map)
        call("ceph-mon", "--mkfs", "-i", "a", "--monmap", monitor_map)
        start("ceph-mon", "-i", "a", "-f")
        call("ceph", "osd", "new", disk)
        call("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", disk)
        start("ceph-osd", "-i", "0", "-f")
        start("radosgw", "-n", "client.rgw", "-f", "--rgw-frontends", f"beast endpoint=127.0.0.1:{gateway}")
        address = f"http://127.0.0.1:{gateway}"
        wait_for("the gateway", lambda: urlopen(address, timeout=5).status == 200, 120)
        keys = [f"--access-key={USER}", f"--secret-key={PASSWORD}"]
        call("radosgw-admin", "user", "create", f"--uid={USER}", f"--display-name={USER}", *keys)
        variables = {
            "MLFLOW_S3_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": USER, "AWS_SECRET_ACCESS_KEY": PASSWORD
        }  # fmt: skip
        client(variables).create_bucket(Bucket=BUCKET)
        yield variables
    finally:
        end_daemons(started)


def client(variables: dict[str, str]):  # type: ignore[no-untyped-def]  # boto3 has no type hints
    """A client of the store."""
    import boto3

    return boto3.client(
        "s3", endpoint_url=variables["MLFLOW_S3_ENDPOINT_URL"], aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip
