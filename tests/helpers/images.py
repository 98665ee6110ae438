"""Images for tests, built and run by buildah without a daemon, where Debian's packages for that are installed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from made_up import ROOT

PROGRAMS = ("buildah", "podman", "debootstrap")
RELEASE = "bookworm"  # its python3 is 3.11


def need_programs() -> None:
    """Skip where an image cannot be built."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        pytest.skip(f"{', '.join(missing)} not installed (apt-get install {' '.join(PROGRAMS)})")
    if os.getuid() != 0:
        pytest.skip("debootstrap needs root")


@dataclass(frozen=True)
class Store:
    """A place for images of its own; nothing of it is left when its folder is removed."""

    folder: Path

    def call(self, *command: str, timeout: float = 600, check: bool = True) -> str:
        """Run podman or buildah on this store. Returns the output."""
        program, *rest = command
        done = subprocess.run(
            [*self.command(program), *rest],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0 or not check, done.stdout[-5000:]
        return done.stdout

    def command(self, program: str) -> list[str]:
        """The beginning of a command line of podman or buildah."""
        folders = ["--root", str(self.folder / "images"), "--runroot", str(self.folder / "run")]
        return [program, "--storage-driver=vfs", *folders]

    def make_base(self, name: str) -> None:
        """An image of Debian with python3, from Debian's packages alone."""
        root = self.folder / "base"
        packages = "--include=python3,python3-venv,ca-certificates"
        subprocess.run(
            ["debootstrap", "--variant=minbase", packages, RELEASE, str(root)],
            check=True, stdout=subprocess.DEVNULL, timeout=600,
        )  # fmt: skip
        archive = self.folder / "base.tar"
        left_out = [f"--exclude=./{folder}/*" for folder in ("proc", "sys", "dev", "var/cache/apt/archives")]
        subprocess.run(["tar", "-C", str(root), *left_out, "-cf", str(archive), "."], check=True)
        self.call("podman", "import", str(archive), name)
        shutil.rmtree(root)
        archive.unlink()

    def build(self, name: str, **arguments: str) -> str:
        """Build the project's Dockerfile. Returns the output."""
        options = [option for key, value in arguments.items() for option in ("--build-arg", f"{key}={value}")]
        return self.call(
            "buildah", "bud", "--isolation", "chroot", "--format", "docker", *options, *self._of_this_machine(),
            "--tag", name, str(ROOT), timeout=1500,
        )  # fmt: skip

    def _of_this_machine(self) -> list[str]:
        """pip's configuration of this machine, as the secret `pip`, with the files that it names."""
        listed = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
        ).stdout
        found = dict(re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", listed, re.MULTILINE))
        found.pop("constraint", None)
        secret = self.folder / "pip.conf"
        secret.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in found.items()))
        words = " ".join(found.values()).split()
        paths = [Path(word) for word in words if word.startswith("/")]
        paths += [Path(word.removeprefix("file://")).parent for word in words if word.startswith("file:///")]
        volumes = [f"--volume={path}:{path}:ro" for path in dict.fromkeys(paths) if path.exists()]
        return ["--secret", f"id=pip,src={secret}", *volumes]

    def configuration(self, name: str) -> dict[str, Any]:
        """User, command, environment and health check of an image."""
        return dict(json.loads(self.call("buildah", "inspect", "--type", "image", name))["Docker"]["config"])


def free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free
