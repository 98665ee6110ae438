"""Rows 34 and 41 of the table of faults: canary secrets appear in no output, log, state, database or artifact.

Real Prefect, with its temporary server, and a real MLflow server, which ignores the password that it is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from world import World

pytestmark = pytest.mark.slow
PASSWORD, TOKEN, HOOK, KEY = (f"canary-{name}-8c1f2e77" for name in ("password", "token", "hook", "key"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    secrets = {
        "FINETUNE_WEBHOOK_URL": f"http://127.0.0.1:9/{HOOK}",
        "HF_TOKEN": TOKEN,
        "HF_ENDPOINT": f"http://me:{PASSWORD}@127.0.0.1:9",
        "AWS_SECRET_ACCESS_KEY": KEY,
    }
    with World(tmp_path_factory.mktemp("world"), **secrets) as made:
        made.start_mlflow()
        yield made


def _run(world: World, port: int, **parameters: Any) -> str:
    """The output of a run against an MLflow server whose address holds the password."""
    return world.run(parameters, MLFLOW_TRACKING_URI=f"http://me:{PASSWORD}@127.0.0.1:{port}")


def _holding_a_canary(base: Path) -> list[tuple[Path, str]]:
    """Files below a folder that hold one of the canaries, as text or inside a database."""
    found = []
    for path in base.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            found += [(path, canary) for canary in (PASSWORD, TOKEN, HOOK, KEY) if canary.encode() in content]
    return found


def test_a_right_server(world: World) -> None:
    """The run completes with the password in the address, and MLflow has the model."""
    output = _run(world, world.mlflow_port)
    assert "\nCompleted " in output, output[-3000:]
    assert list((world.base / "artifacts").rglob("model.safetensors"))
    assert len(world.query("select * from log")) > 5  # logs do reach the database that is searched
    assert _holding_a_canary(world.base) == []


def test_a_wrong_server(world: World) -> None:
    """The state's message names the server and not the password; a webhook that does not answer is not named."""
    output = _run(world, 9)
    assert "\nFailed " in output, output[-3000:]
    states = "select s.message from flow_run r join flow_run_state s on r.state_id = s.id where s.type = 'FAILED'"
    ((message,),) = world.query(states)
    assert "127.0.0.1" in message
    assert _holding_a_canary(world.base) == []


def test_a_hub_with_a_password_in_its_address(world: World) -> None:
    output = _run(world, world.mlflow_port, dataset="someone/rows")
    assert "Could not fetch the dataset someone/rows" in output, output[-3000:]
    assert _holding_a_canary(world.base) == []
