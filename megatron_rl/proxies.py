"""This module finds the proxy that the environment names for an address, for clients of servers that others may run."""

import ipaddress
from collections.abc import Mapping
from importlib.util import find_spec
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

_SCHEMES = ("http", "https", "socks5", "socks5h")


def proxy_for(url: str, where: str) -> str | None:
    """Return the proxy that stands before `url`, by http_proxy, https_proxy, all_proxy and no_proxy; None for none.

    This machine is asked directly whatever they say: a proxy would look for the address on its own. where: what names
    the url, for messages. ValueError for a proxy that cannot be used.
    """
    host = urlsplit(url).hostname or ""
    if _is_this_machine(host) or proxy_bypass(host):
        return None
    proxies = getproxies()
    proxy = proxies.get(urlsplit(url).scheme.lower()) or proxies.get("all")
    if not proxy:
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    scheme = urlsplit(proxy).scheme.lower()
    remedy = f"set no_proxy={host} if {where} needs none"
    if scheme not in _SCHEMES:
        raise ValueError(
            f"the environment names the proxy {shown_proxy(proxy)} for {where} {url}, and its kind must be one of "
            f"{', '.join(_SCHEMES)}; {remedy}"
        )
    if scheme.startswith("socks") and find_spec("socksio") is None:
        raise ValueError(
            f"the environment names the proxy {shown_proxy(proxy)} for {where} {url}, and SOCKS needs the Python "
            f"package socksio; install it (pip install socksio), or {remedy}"
        )
    return proxy


def told_of_proxy(proxy: str | None) -> str:
    """Say for an error message which proxy the request went through; "" for none."""
    return f" through the proxy {shown_proxy(proxy)} of the environment" if proxy else ""


def shown_proxy(proxy: str) -> str:
    """Write a proxy without its user and password."""
    scheme, _, rest = proxy.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def without_proxy(environment: Mapping[str, str], host: str) -> dict[str, str]:
    """Return the variables with which a child asks this machine and `host` without a proxy."""
    named = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    hosts = ",".join(dict.fromkeys([*filter(None, named.split(",")), "localhost", "127.0.0.1", host]))
    return {"no_proxy": hosts, "NO_PROXY": hosts}


def _is_this_machine(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified
