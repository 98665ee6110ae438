"""Create or update a virtual environment from the pinned constraints, and say what comes and what is being done.

    python .ci/install.py VENV [EXTRA ...]

Only the standard library is imported, since nothing is installed yet. pip's configuration is the user's: where it
names sources of its own, they are used. Otherwise ``TORCH_INDEX`` chooses PyTorch's build: ``cpu``, ``pypi`` (CUDA on
Linux) or the address of an index. Without it a machine without a GPU takes the CPU build, and a terminal is asked.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SOURCES = ("index-url", "extra-index-url", "find-links", "no-index")
CHOICE = ".torch-index"  # in the environment: the answer of the user, who is asked once
# Packages, MB to download and MB on the disk, measured with Python 3.11 on Linux x86-64 on 2026-11-26.
RUN = (181, 441, 1570)
EXTRAS = {"dev": (32, 37, 110), "docs": (4, 19, 92)}
CUDA = 2540  # MB to download that PyPI's torch and its CUDA libraries are more than the CPU build


class InstallError(Exception):
    """What the user has to do, in one sentence."""


@dataclass
class Progress:
    """Says what is being done: on a terminal one line that is kept up to date, else a line every ten seconds.

    Attributes:
        packages: the folder into which packages are unpacked.
        doing: what is being done now.
        total: packages that are being unpacked; 0 before that.
    """

    packages: Path
    doing: str = ""
    total: int = 0
    begun: float = field(default_factory=time.monotonic)
    _before: int = 0
    _ended: Event = field(default_factory=Event)

    def say(self, doing: str) -> None:
        """Begin another piece of work."""
        self.doing = doing
        self._print()

    def unpack(self, total: int) -> None:
        """Begin to unpack packages: how far that is, is counted in the folder."""
        self.total, self._before = total, self._count()
        self.say("unpacking packages")

    def watch(self) -> Thread:
        """Repeat what is being done until ``end``."""
        thread = Thread(target=self._repeat, daemon=True)
        thread.start()
        return thread

    def end(self, thread: Thread, last: str) -> None:
        """Stop repeating, with a last line."""
        self._ended.set()
        thread.join()
        self.total = 0
        self.say(last)
        if sys.stdout.isatty():
            print()

    def _repeat(self) -> None:
        while not self._ended.wait(1 if sys.stdout.isatty() else 10):
            self._print()

    def _count(self) -> int:
        return sum(1 for _ in self.packages.glob("*.dist-info"))

    def _print(self) -> None:
        done = f": {max(self._count() - self._before, 0)} of {self.total}" if self.total else ""
        line = f"{time.monotonic() - self.begun:4.0f} s  {self.doing}{done}"
        if sys.stdout.isatty():
            print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        else:
            print(line, flush=True)


@dataclass(frozen=True)
class Build:
    """Which build of PyTorch comes from where.

    Attributes:
        index: the index that torch alone is taken from; None leaves it to pip.
        reason: for the user.
        cuda: whether CUDA's libraries come with it.
    """

    index: str | None
    reason: str
    cuda: bool


def configured_sources(python: Path) -> list[str]:
    """The names of pip's settings that name sources of packages; their values may hold passwords."""
    done = subprocess.run([str(python), "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    names = [line.partition("=")[0].rpartition(".")[2] for line in done.stdout.splitlines()]
    return [name for name in SOURCES if name in names]


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU."""
    if any(Path("/proc/driver/nvidia/gpus").glob("*")):
        return True
    command = shutil.which("nvidia-smi")
    return bool(command) and b"GPU" in subprocess.run([str(command), "-L"], capture_output=True).stdout


def choose_build(wanted: str, sources: list[str], gpu: bool, system: str, answer: str | None) -> Build:
    """Which build of PyTorch to install.

    Args:
        wanted: the value of TORCH_INDEX; empty if it is not set.
        sources: the settings of pip that name sources.
        gpu: whether there is an NVIDIA GPU.
        system: ``platform.system()``; only Linux has CUDA builds on PyPI.
        answer: what the user answered: "cpu" or "pypi"; None if nobody was asked.

    Raises:
        InstallError: TORCH_INDEX is neither a known word nor an address.
    """
    linux = system == "Linux"
    if wanted == "cpu":
        return Build(CPU_INDEX, "the CPU build, as TORCH_INDEX says", cuda=False)
    if wanted == "pypi":
        return Build(None, "PyPI's build, as TORCH_INDEX says", cuda=linux)
    if wanted:
        if "://" not in wanted:
            raise InstallError(f"TORCH_INDEX={wanted} is none of cpu, pypi and the address of an index")
        return Build(wanted, "from the index that TORCH_INDEX names", cuda="/cu" in wanted)
    if sources:
        return Build(None, f"from the sources of pip's configuration ({', '.join(sources)})", cuda=False)
    if not linux:
        return Build(None, f"PyPI's build for {system}", cuda=False)
    if answer:
        return choose_build(answer, [], gpu, system, None)
    if gpu:
        return Build(None, "PyPI's build for CUDA, because this machine has an NVIDIA GPU", cuda=True)
    return Build(CPU_INDEX, "the CPU build, because this machine has no NVIDIA GPU", cuda=False)


def ask() -> str | None:
    """Ask a user at a terminal which build a machine without a GPU gets; None where nobody can be asked."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    print("This machine has no NVIDIA GPU. Which build of PyTorch is to be installed?")
    print("  cpu   for this machine (the default)")
    print(f"  pypi  for CUDA, {_size(CUDA)} more to download")
    while (answer := input("cpu or pypi? ").strip().lower() or "cpu") not in ("cpu", "pypi"):
        pass
    return answer


def announce(build: Build | None, extras: list[str], folder: Path) -> None:
    """Say what is coming and how large it is, before anything is fetched."""
    parts = [EXTRAS[name] for name in extras] or [RUN]
    count, download, disk = (sum(part[n] for part in parts) for n in range(3))
    more = CUDA if build and build.cuda else 0
    names = f"the extras {', '.join(extras)}" if extras else "what make run needs"
    print(f"Installing {names} into {folder} (Python {platform.python_version()}, pins of constraints.txt):")
    print(f"about {count} packages, {_size(download + more)} to download; what is there is kept.")
    print(f"On the disk: {_size(disk)}{', and the libraries for CUDA' if more else ''}.")
    if build:
        print(f"PyTorch: {build.reason}.")
        if build.index:
            print(f"  It alone comes from {build.index}; TORCH_INDEX=pypi takes PyPI's build for CUDA instead.")
        elif not build.cuda and platform.system() == "Linux":
            print(f"  If they have the build for CUDA alone, {_size(CUDA)} more come: TORCH_INDEX=cpu prevents it.")
        elif build.cuda:
            print(f"  {_size(CUDA)} of the download are for CUDA; TORCH_INDEX=cpu takes the CPU build instead.")
    sys.stdout.flush()


def _size(megabytes: float) -> str:
    return f"{megabytes / 1000:.1f} GB" if megabytes >= 1000 else f"{megabytes:.0f} MB"


def pip_install(python: Path, arguments: list[str], progress: Progress) -> None:
    """Run pip, and tell from its output what it is doing.

    Raises:
        InstallError: pip failed; its last lines are on stderr.
    """
    # Modules are compiled when they are first imported. Compiling all of them here takes as long as all else that pip
    # does: 46 s of processor time, where those that a run imports take 12.
    command = [str(python), "-m", "pip", "install", "--no-compile", "--progress-bar", "off", "--no-color"]
    command += ["--disable-pip-version-check", "--constraint", "constraints.txt", *arguments]
    lines: list[str] = []
    collected = 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            lines.append(line.rstrip())
            if line.startswith("Collecting "):
                collected += 1
                progress.doing = f"looking packages up: {collected}, {line.split()[1].split('=')[0]}"
            elif found := re.search(r"(?:Downloading|Using cached) (?:\S+/)?([\w.]+)-\S+\.(?:whl|gz) \((.+)\)", line):
                progress.doing = f"fetching {found[1]} ({found[2]})"
            elif line.startswith("Installing collected packages: "):
                progress.unpack(line.count(",") + 1)
    if process.returncode:
        print(*lines[-15:], sep="\n", file=sys.stderr)
        raise InstallError(f"pip failed with status {process.returncode}: its last lines are above")


def compile_all(python: Path, packages: Path, progress: Progress) -> None:
    """Compile all modules, on all cores: with PYTHONDONTWRITEBYTECODE each process would compile what it imports."""
    progress.total = 0
    progress.say("compiling modules, since PYTHONDONTWRITEBYTECODE is set")
    subprocess.run([str(python), "-m", "compileall", "-q", "-j", "0", str(packages)], stdout=subprocess.DEVNULL)


def installed_torch(packages: Path) -> str | None:
    """The version of torch that is there, without its build."""
    found = [path.name.split("-")[1] for path in packages.glob("torch-*.dist-info")]
    return found[0].split("+")[0] if found else None


def decide(python: Path, folder: Path, packages: Path) -> Build | None:
    """Which build of PyTorch to install; None if the pinned version is there."""
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if pinned and installed_torch(packages) == pinned[1]:
        return None
    wanted, sources, gpu = os.environ.get("TORCH_INDEX", ""), configured_sources(python), has_gpu()
    system, kept = platform.system(), folder / CHOICE
    answer = kept.read_text() if kept.exists() else None
    if not answer and not wanted and not sources and not gpu and system == "Linux" and (answer := ask()):
        kept.write_text(answer)
    return choose_build(wanted, sources, gpu, system, answer)


def main(arguments: list[str]) -> int:
    """Install. Returns the exit status."""
    folder, extras = Path(arguments[0]), arguments[1:]
    python = folder / "bin" / "python"
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    progress = Progress(packages)
    try:
        if not python.exists() or not (packages / "pip").exists():
            progress.say(f"making {folder}")
            if subprocess.run([sys.executable, "-m", "venv", str(folder)]).returncode:
                raise InstallError(f"{folder} could not be made: Python's message is above")
        build = None if extras else decide(python, folder, packages)
        announce(build, extras, folder)
        thread = progress.watch()
        progress.say("looking packages up")
        try:
            if build and build.index:
                pip_install(python, ["--no-deps", "--index-url", build.index, "torch"], progress)
            project = f".[{','.join(extras)}]" if extras else "."
            pip_install(python, ["--editable", project], progress)
            if sys.dont_write_bytecode:
                compile_all(python, packages, progress)
        finally:
            progress.end(thread, "installed" if sys.exc_info()[0] is None else "stopped")
    except InstallError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
