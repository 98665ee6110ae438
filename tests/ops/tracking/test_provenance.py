"""Which code made a run."""

from __future__ import annotations

import os

import pytest

from ops.tracking.provenance import git_sha, installed_packages


def test_constraints_are_those_installed() -> None:
    """The logged list is what ran, not what was asked for."""
    import torch

    assert f"torch=={torch.__version__}" in installed_packages().splitlines()


def test_git_sha_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without git, or no checkout, is no error."""
    monkeypatch.setenv("PATH", os.devnull)
    assert git_sha() is None
    monkeypatch.setenv("FINETUNE_COMMIT", "0123abc")  # the build of an image sets it
    assert git_sha() == "0123abc"


def test_a_checkout_knows_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_COMMIT", "0123abc")
    assert git_sha() != "0123abc"
