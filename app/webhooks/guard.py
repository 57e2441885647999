"""The address guard: customers choose where we connect, so a name is resolved once and every answer of it is checked.

The connection goes to the address that was checked, while TLS and the Host header keep the name. Nothing is asked of
`ipaddress.is_global`: Python 3.11 calls several of these networks public.
"""

import asyncio
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import httpcore
import httpx

from app.core.errors import BadRequest
from app.core.settings import WebhookSettings

MAX_URL_LENGTH = 2048

Resolve = Callable[[str], Sequence[str]]
Address = IPv4Address | IPv6Address

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
# a last label that begins with a letter leaves out 127.1, 0x7f000001, 017700000001 and the trailing dot
_NAME = re.compile(rf"(?:{_LABEL}\.)*(?=[a-z]){_LABEL}")
_LOOPBACK = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))
_CLOSED_V4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # "this network": Linux takes 0.0.0.0 for loopback
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local, and with it the clouds' metadata services
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # automatic multicast tunnelling
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
# outside lie ::, ::1, v4-mapped, NAT64, discard-only, SRv6, unique local, link-local, site-local and multicast
_GLOBAL_UNICAST_V6 = IPv6Network("2000::/3")
_CLOSED_V6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments: Teredo, benchmarking, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112
        "3ffe::/16",  # 6bone, returned
        "3fff::/20",  # documentation
    )
)


class UrlRefused(BadRequest):
    code, param = "url_not_allowed", "url"


def parse(url: str, settings: WebhookSettings) -> httpx.URL:
    """The URL, if deliveries may be tried there. A name's addresses are checked when it is connected to. Raises UrlRefused."""
    if len(url) > MAX_URL_LENGTH:
        raise UrlRefused(f"the URL is longer than {MAX_URL_LENGTH} characters; shorten it")
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise UrlRefused("the URL is malformed; give one like https://example.com/hooks") from error
    if parsed.scheme not in ("https", "http"):
        raise UrlRefused("the URL must begin with https:// or http://")
    if parsed.userinfo:
        raise UrlRefused("the URL carries a user name; remove it, since deliveries prove themselves by their signature")
    if parsed.port is not None and not 0 < parsed.port < 65536:
        raise UrlRefused("the URL's port must be from 1 to 65535")
    host = parsed.raw_host.decode()
    literal = find_literal(host)
    if literal is None and (len(host) > 253 or not _NAME.fullmatch(host)):
        raise UrlRefused("the URL's host must be a plain name such as hooks.example.com, or an IP address in its usual form")
    if literal is not None:
        require_open(host, [host], settings)
    return parsed


def require_open(host: str, addresses: Iterable[str], settings: WebhookSettings) -> None:
    """Every address that the host leads to must be open to webhooks, and there must be one.

    Raises UrlRefused, which tells neither the address nor whether there is one: nobody maps our network with this.
    """
    if host in {allowed.lower() for allowed in settings.allowed_hosts}:
        return
    literals = [find_literal(address) for address in addresses]
    if not literals or not all(literal and _is_open(literal, settings) for literal in literals):
        raise UrlRefused(f"{host} does not lead to a public address; use a public one, or ask the operator to allow the host")


def find_literal(host: str) -> Address | None:
    """The address that the text is, in its usual form and without a zone; None if it is none."""
    for kind in (IPv4Address, IPv6Address):
        try:
            address = kind(host)
        except ValueError:
            continue
        return None if "%" in host else address
    return None


def resolve(host: str) -> Sequence[str]:
    """Every address of a name, in the order in which to try them. Raises OSError."""
    return [str(address[0]) for *_, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]


class GuardedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were checked, and to nothing else. The time-out is for each of them."""

    def __init__(
        self, settings: WebhookSettings, resolve: Resolve, threads: Executor, network: httpcore.AsyncNetworkBackend
    ) -> None:
        self._settings, self._resolve, self._threads, self._network = settings, resolve, threads, network

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception = httpcore.ConnectError("the name does not resolve")
        for address in await self._checked(host):
            try:
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def _checked(self, host: str) -> Sequence[str]:
        """Resolved here and never again, so that a second answer cannot differ from the checked one."""
        if find_literal(host):
            addresses: Sequence[str] = [host]
        else:
            try:
                # threads of their own: slow name servers are the customers', and must not hold up the relay's
                addresses = await asyncio.get_running_loop().run_in_executor(self._threads, self._resolve, host)
            except OSError:
                addresses = []
        require_open(host, addresses, self._settings)
        return addresses


def _is_open(address: Address, settings: WebhookSettings) -> bool:
    if settings.allow_loopback and any(address in network for network in _LOOPBACK):
        return True
    if isinstance(address, IPv6Address):
        return address in _GLOBAL_UNICAST_V6 and not any(address in network for network in _CLOSED_V6)
    return not any(address in network for network in _CLOSED_V4)
