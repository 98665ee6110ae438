"""Servers on this machine are reached directly, although the environment names a proxy for all others.

Prefect's and MLflow's clients send every request to the proxy of HTTP_PROXY, those to 127.0.0.1 too, and the proxy
means itself by that address or refuses it: a run would wait for its own server until it gives up.
"""

from __future__ import annotations

from collections.abc import MutableMapping

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def spare_loopback(environment: MutableMapping[str, str]) -> None:
    """Add the loopback's names to NO_PROXY and no_proxy where a proxy is set. What they hold already stays."""
    if not any(environment.get(name) or environment.get(name.upper()) for name in _PROXIES):
        return
    # Python's urllib prefers the name in small letters, and other programs know one of the two only.
    known = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    hosts = [host.strip() for host in known.split(",") if host.strip()]
    value = ",".join([*hosts, *(name for name in LOOPBACK if name not in hosts)]) if "*" not in hosts else "*"
    environment["no_proxy"] = environment["NO_PROXY"] = value
