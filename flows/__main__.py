"""``python -m flows [deployment] [name=value ...]``: the flow in this process, with no server and no account.

The parameters are those of a deployment in prefect.yaml, ``tiny`` unless named, which needs no hub either.
"""

from __future__ import annotations

import gc
import inspect
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace
from typing import Any

import yaml

from ops.machine.lock import exclusive
from ops.machine.process import end_processes, identify_process, left_behind
from ops.settings import PROJECT_ROOT, Settings

RUN = "FINETUNE_RUN"  # of which run a process is, for the next one if that is killed
_SERVERS = (
    "PREFECT_API_URL",
    "PREFECT_API_KEY",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_API_DATABASE_CONNECTION_URL",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    "PREFECT_PROFILE",
    "MLFLOW_TRACKING_URI",
)


def embed(settings: Settings) -> None:
    """Point this process at Prefect's ephemeral server and at MLflow on sqlite, both in the data root.

    Whatever servers the user's environment names are left out on purpose: this run needs none.
    """
    for name in _SERVERS:
        os.environ.pop(name, None)
    home = settings.data_root / "prefect"
    home.mkdir(parents=True, exist_ok=True)  # the server does not make it, and then cannot open its database
    os.environ.update(
        PREFECT_HOME=str(home),
        PREFECT_PROFILES_PATH=str(home / "profiles.toml"),
        PREFECT_SERVER_ALLOW_EPHEMERAL_MODE="true",
        # A fresh database takes 23 s on two cores; the default limit is 20.
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="120",
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
    )


def start(settings: Settings) -> None:
    """Start Prefect's ephemeral server, and meanwhile load what the flow will need: the server takes seconds too.

    One process at a time: neither Prefect nor MLflow survives that another makes the same sqlite database meanwhile.
    """
    # The collector takes a quarter of the time of imports, and more at the process's end, for what stays anyway.
    gc.disable()
    import prefect.server.api.server as prefect_server  # here, as two threads must not import parts of one package
    from prefect.client.orchestration import get_client

    # Out of the terminal's reach: a server that Ctrl-C ends too cannot be told how the run ended, and is asked for
    # two minutes.
    apart = partial(subprocess.Popen, start_new_session=True)
    prefect_server.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": apart})  # type: ignore[assignment, attr-defined]
    server: Future[Any] = Future()

    def start_server() -> None:
        try:
            server.set_result(get_client(sync_client=True))
        except BaseException as error:
            server.set_exception(error)

    with exclusive(settings.locks, "databases", "make run", print):
        for orphan in end_processes(lambda: left_behind(RUN), 5):
            print(f"ended what a killed run had left: {orphan}")
        os.environ[RUN] = identify_process().to_json()
        threading.Thread(target=start_server, daemon=True).start()  # no exit waits for it
        import torch._dynamo  # noqa: F401  # torch's optimizers do so at first use
        from transformers import AutoTokenizer  # noqa: F401

        import flows.finetune  # noqa: F401
        from ops.tracking.runs import client

        client(settings.tracking_uri).search_experiments(max_results=1)  # makes a fresh database
        server.result()
    gc.freeze()
    gc.enable()


def read_parameters(deployment: str) -> dict[str, Any]:
    """The parameters of a deployment in prefect.yaml.

    Raises:
        LookupError: there is no deployment of that name.
    """
    deployments = yaml.safe_load((PROJECT_ROOT / "prefect.yaml").read_text())["deployments"]
    parameters = {d["name"]: d["parameters"] for d in deployments}
    if deployment not in parameters:
        raise LookupError(f"prefect.yaml has no deployment {deployment!r}, only {', '.join(parameters)}")
    return dict(parameters[deployment])


def complaint(parameters: Mapping[str, Any]) -> str | None:
    """What is wrong with the flow's parameters, by name; None if nothing is."""
    from prefect.exceptions import ParameterTypeError

    from flows.finetune import finetune

    if unknown := sorted(parameters.keys() - inspect.signature(finetune.fn).parameters):
        return f"no parameter is called {', '.join(unknown)}: README.md lists them"
    log = logging.getLogger("prefect.flows")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it would say the same, at length
    try:
        finetune.validate_parameters(dict(parameters))
    except ParameterTypeError as error:
        return str(error)
    finally:
        log.setLevel(level)
    return None


def before_and_after(metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> str:
    """The untouched base beside the tuned model, as a table for a terminal, and a few samples."""
    lines = ["", f"{'held-out rows':<16}{'base':>10}{'tuned':>10}"]
    for title, base, tuned, form in (
        ("loss", "base/test_loss", "test/loss", ".4f"),
        ("perplexity", "base/test_perplexity", "test/perplexity", ".2f"),
        ("stop rate", "base/stop_rate", "sample/stop_rate", ".1%"),
        ("pass rate", "base/pass_rate", "sample/pass_rate", ".1%"),
    ):
        if tuned in metrics:
            lines.append(f"{title:<16}{metrics[base]:>10{form}}{metrics[tuned]:>10{form}}")
    for sample in samples:
        lines += ["", sample["prompt"]]
        for title in ("base", "tuned"):
            lines += [f"  {title}:", *(f"    {line}" for line in sample[title].splitlines()[:8])]
    return "\n".join(lines) + "\n"


def time_table(seconds: Mapping[str, float]) -> str:
    """Seconds and share of each step, and their sum, as a table for a terminal."""
    total = sum(seconds.values())
    lines = [f"{'time':<16}{'seconds':>10}{'share':>10}"]
    for step, taken in (*seconds.items(), ("total", total)):
        lines.append(f"{step:<16}{taken:>10.2f}{taken / total:>10.1%}")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Run the flow with a deployment's parameters, some of them changed. Returns the exit status."""
    begin = time.perf_counter()
    if {"-h", "--help"} & {*arguments}:
        print(f"{__doc__}\nREADME.md has all parameters.")
        return 0
    named = [argument for argument in arguments if "=" not in argument]
    if len(named) > 1:
        print(f"one deployment at a time, not {', '.join(named)}; parameters are name=value", file=sys.stderr)
        return 2
    try:
        parameters = read_parameters(named[0] if named else "tiny")
    except LookupError as error:
        print(error, file=sys.stderr)
        return 2
    for argument in arguments:
        name, separator, value = argument.partition("=")
        if sum(other.startswith(f"{name}=") for other in arguments) > 1:
            print(f"{name} is given twice", file=sys.stderr)
            return 2
        try:
            if separator:
                parameters[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            print(f"{argument}: the value is not YAML; quote it", file=sys.stderr)
            return 2
    embed(Settings.load())
    start(Settings.load())  # the environment is another now

    from flows.finetune import finetune

    if wrong := complaint(parameters):
        print(wrong, file=sys.stderr)
        return 2
    started = time.perf_counter()
    state = finetune(**parameters, return_state=True)
    if state.is_failed():  # the log has the traceback
        print(f"{state.name}: {state.message}", file=sys.stderr)
        return 1
    result = state.result()
    ended = time.perf_counter()
    # Prefect's farewell to its temporary server would come behind the two lines that scripts read.
    logging.getLogger("prefect").setLevel(logging.WARNING)
    if result is None:
        print(f"{state.name}: {state.message}")
        return 0
    print(before_and_after(result.metrics, result.samples))
    around = ended - started - sum(result.seconds.values())
    print(time_table({"start": started - begin, "prefect": around, **result.seconds}))
    if result.verdict:
        print(f"{'champion' if result.verdict.promoted else 'challenger'}: {result.model}, {result.verdict.reason}")
    print(f"tracking: {result.run.tracking_uri}")
    print(f"run: {result.run.run_id}")
    return 0


def end_in_order() -> None:
    """Have SIGTERM, and a terminal that is closed, run what is to be done at exit: the temporary server ends then.

    In a flow run Prefect's handler comes first, and hands on to this one when the run is closed.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))


if __name__ == "__main__":
    end_in_order()
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where the training stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
