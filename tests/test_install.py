"""The installation: which build of PyTorch comes, what is said before, and what is said meanwhile."""

from __future__ import annotations

import importlib.util
import os
import pty
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / ".ci" / "install.py"


@pytest.fixture(scope="module")
def install() -> ModuleType:
    """The script .ci/install.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    assert spec
    assert spec.loader
    module = sys.modules["install"] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("wanted", "sources", "gpu", "system", "answer", "index", "cuda"),
    [
        ("", [], False, "Linux", None, "CPU", False),  # nobody to ask: never CUDA without a GPU
        ("", [], False, "Linux", "cpu", "CPU", False),
        ("", [], False, "Linux", "pypi", None, True),
        ("", [], True, "Linux", None, None, True),
        ("", [], False, "Darwin", None, None, False),
        ("", ["index-url"], False, "Linux", None, None, False),  # pip's configuration wins over what is chosen here
        ("", ["find-links"], True, "Linux", None, None, False),
        ("cpu", ["find-links"], True, "Linux", None, "CPU", False),  # what the user says now wins over all
        ("pypi", [], False, "Linux", None, None, True),
        ("https://example.org/whl/cu130", [], False, "Linux", None, "https://example.org/whl/cu130", True),
    ],
)
def test_which_build_comes(
    install: ModuleType, wanted: str, sources: list[str], gpu: bool, system: str, answer: str | None,
    index: str | None, cuda: bool,
) -> None:  # fmt: skip
    """TORCH_INDEX, then pip's own sources, then the user's answer, then the hardware."""
    build = install.choose_build(wanted, sources, gpu, system, answer)
    assert build.index == (install.CPU_INDEX if index == "CPU" else index)
    assert build.cuda is cuda
    assert build.reason


def test_a_word_that_is_no_index_is_refused(install: ModuleType) -> None:
    """In one sentence with what may be given."""
    with pytest.raises(install.InstallError, match="TORCH_INDEX=gpu is none of cpu, pypi and the address"):
        install.choose_build("gpu", [], False, "Linux", None)


def test_sources_of_pip_are_named_without_values(install: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """An address may hold a password."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        for name in [name for name in os.environ if name.startswith("PIP_") and name != "PIP_CONFIG_FILE"]:
            patch.delenv(name)
        assert install.configured_sources(Path(sys.executable)) == []
        patch.setenv("PIP_INDEX_URL", "https://user:secret@127.0.0.1:9/simple")
        sources = install.configured_sources(Path(sys.executable))
    assert sources == ["index-url"]
    install.announce(install.choose_build("", sources, False, "Linux", None), [], Path(".venv"))
    said = capsys.readouterr().out
    assert "from the sources of pip's configuration (index-url)" in said
    assert "2.5 GB more come" in said
    assert "secret" not in said


def test_size_and_build_are_said_first(install: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """CUDA's libraries are part of what is announced."""
    install.announce(install.choose_build("", [], True, "Linux", None), [], Path(".venv"))
    cuda = capsys.readouterr().out
    install.announce(install.choose_build("", [], False, "Linux", None), [], Path(".venv"))
    cpu = capsys.readouterr().out
    assert f"{(install.RUN[1] + install.CUDA) / 1000:.1f} GB to download" in cuda
    assert f"{install.RUN[1]} MB to download" in cpu
    assert "because this machine has no NVIDIA GPU" in cpu
    assert f"comes from {install.CPU_INDEX}" in cpu


def test_nobody_is_asked_without_a_terminal(install: ModuleType) -> None:
    """CI must not wait for an answer."""
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import install; print(install.ask())"
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.stdout == "None\n", done.stderr


@pytest.mark.parametrize(("typed", "answer"), [("\n", "cpu"), ("cuda\npypi\n", "pypi")])
def test_a_terminal_is_asked(install: ModuleType, typed: str, answer: str) -> None:
    """Return takes the CPU build; a word that is no answer is asked for again."""
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import install; print('answer', install.ask())"
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs)
        os.write(ours, typed.encode())
        assert process.wait(60) == 0
        said = os.read(ours, 4096).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert f"answer {answer}" in said
    assert "2.5 GB more to download" in said


def test_the_pinned_torch_is_recognised(install: ModuleType, tmp_path: Path) -> None:
    """Whatever its build: then nothing is chosen or asked."""
    assert install.installed_torch(tmp_path) is None
    (tmp_path / "torch-2.13.0+cpu.dist-info").mkdir()
    assert install.installed_torch(tmp_path) == "2.13.0"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment."""
    folder = tmp_path_factory.mktemp("install") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder


def test_what_pip_does_is_said(install: ModuleType, environment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Looking up, unpacking, the end; a failure shows pip's own lines."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = environment / "lib" / version / "site-packages"
    wheel = environment / "brick-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("brick.py", "")
        archive.writestr("brick-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: brick\nVersion: 1.0\n")
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr("brick-1.0.dist-info/WHEEL", tags)
        archive.writestr("brick-1.0.dist-info/RECORD", "")
    progress = install.Progress(packages)
    thread = progress.watch()
    install.pip_install(environment / "bin" / "python", ["--no-index", str(wheel)], progress)
    progress.end(thread, "installed")
    said = capsys.readouterr().out
    assert " s  unpacking packages: 0 of 1" in said
    assert said.endswith(" s  installed\n")
    assert (packages / "brick.py").exists()
    assert not list(packages.glob("__pycache__/brick.*")), "modules are compiled when they are imported"
    with pytest.raises(install.InstallError, match="pip failed with status 1"):
        install.pip_install(environment / "bin" / "python", ["--no-index", "no-such-brick"], progress)
    assert "no-such-brick" in capsys.readouterr().err


def _closure(extra: str) -> set[str]:
    """The distributions that the project needs, itself included."""
    found, waiting = set(), [("finetune-gpt2-code", frozenset({extra} if extra else ()))]
    while waiting:
        name, extras = waiting.pop()
        for line in distribution(name).requires or ():
            need = Requirement(line)
            if any(need.marker is None or need.marker.evaluate({"extra": each}) for each in extras or {""}):
                waiting += [(need.name, frozenset(need.extras))] * (need.name not in found)
                found.add(need.name)
    return {distribution(name).metadata["Name"] for name in found} | {"finetune-gpt2-code"}


def test_the_figures_are_those_of_this_environment(install: ModuleType) -> None:
    """Number of packages within 15, size on the disk within a quarter; CUDA builds have other sizes."""
    names = _closure("")
    assert abs(len(names) - install.RUN[0]) <= 15
    if "+cpu" not in distribution("torch").version:
        pytest.skip("not the CPU build of PyTorch")
    files = [file for name in names for file in distribution(name).files or () if file.suffix != ".pyc"]
    megabytes = sum(Path(path).stat().st_size for file in files if Path(path := file.locate()).is_file()) / 1e6
    assert install.RUN[2] == pytest.approx(megabytes, rel=0.25)
