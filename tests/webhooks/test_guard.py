"""Where deliveries may go. Names are tested here without connecting; test_delivery connects."""

import asyncio
import socket
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpcore
import pytest

from app.core.settings import WebhookSettings
from app.webhooks import guard

NOTHING_MORE = WebhookSettings()
LOOPBACK = WebhookSettings(allow_loopback=True)


def _words(text: str) -> list[str]:
    return text.split()


CLOSED = _words("""
    0.0.0.0 0.1.2.3 10.0.0.0 10.255.255.255 100.64.0.0 100.127.255.255 127.0.0.1 127.255.255.255 169.254.0.1 169.254.169.254
    172.16.0.0 172.31.255.255 192.0.0.1 192.0.0.170 192.0.2.7 192.31.196.1 192.52.193.1 192.88.99.1 192.168.0.0 192.168.255.255
    192.175.48.1 198.18.0.0 198.19.255.255 198.51.100.1 203.0.113.255 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
    :: ::1 ::2 ::7f00:1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:8.8.8.8 ::ffff:0:127.0.0.1 64:ff9b::7f00:1
    64:ff9b::8.8.8.8 64:ff9b:1::1 100::1 1fff:ffff::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:1::1 2001:2::1
    2001:10::1 2001:20::1 2001:1ff:ffff::1 2001:db8::1 2002:7f00:1::1 2002:808:808::1 2620:4f:8000::1 3ffe::1 3fff::1
    3fff:fff::1 4000::1 5f00::1 fc00::1 fd00:ec2::254 fdff::1 fe80::1 febf::1 fec0::1 feff::1 ff02::1 ff0e::1
    0:0:0:0:0:ffff:127.0.0.1 0000::1
""")

OPEN = _words("""
    1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 93.184.216.34 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 169.253.255.255
    169.255.0.0 172.15.255.255 172.32.0.0 191.255.255.255 192.0.1.0 192.0.3.0 192.167.255.255 192.169.0.0 198.17.255.255
    198.20.0.0 203.0.114.0 223.255.255.255 2001:200::1 2001:4860:4860::8888 2003::1 2606:4700:4700::1111
    2a00:1450:4001:80b::200e 3fff:1000::1
""")

MALFORMED = _words("""
    127.1 127.0.1 0177.0.0.1 0x7f.0.0.1 0x7f000001 2130706433 017700000001 127.0.0.01 127.0.0.1. 1.1.1.1. example.com. 1.2.3
    1.2.3.4.5 256.1.1.1 8.8.8 8.8.8.8.com. .com a..b -a.com a-.com a.-b *.com exa%6dple.com exa$mple.com a.0x1 a.1
    0 0x0 00.0.0.0 0177.1 0x7f.1 127.0.0.0x1 127.0.0.1%00 localhost. loc%61lhost ⓛocalhost lo\u00adcalhost
    [fe80::1%25eth0] [::1%lo] [::g] [1.2.3.4] [v1.a] 。 ⓪ １２７.１ ①②⑦.⓪.⓪.① １２７。0。0。1. ١٢٧.٠.٠.١
""")

PUBLIC_NAMES = _words("""
    example.com hooks.example.com a_b.example.com münchen.example xn--mnchen-3ya.example 1und1.de A.EXAMPLE x
""")

NO_PLAIN_URLS = [
    "",
    "example.com/hooks",
    "//example.com",
    "ftp://example.com",
    "file:///etc/passwd",
    "gopher://example.com",
    "http:example.com",
    "http://",
    "http:///hooks",
    "http://user@example.com",
    "http://user:secret@example.com",
    "http://8.8.8.8\\@10.0.0.1/",
    "http://8.8.8.8\\.10.0.0.1/",
    "http://8.8.8.8 &@10.0.0.1# @1.1.1.1/",
    "http://8.8.8.8;@10.0.0.1/",
    "http://8.8.8.8:80:90/",
    "http://8.8.8.8:10.0.0.1/",
    "http://[::1]:80@8.8.8.8/",
    "http://@10.0.0.1/",
    "http://10.0.0.1#@8.8.8.8/",
    "http:/8.8.8.8/",
    "http:\\\\8.8.8.8/",
    "jar:http://8.8.8.8!/",
    "http://8.8.8.8/\r\nx: y",
    "http://8.8.8.8\t/",
    "http://example.com:0",
    "http://example.com:65536",
    "http://example.com:-1",
    "http://example.com:x",
    "http://[::1",
    "http://example.com/\n",
    "http://exam\x00ple.com",
    "http://exam ple.com",
    "http://example.com/\ud800",
    f"http://a.b/{'x' * 2048}",
]


@pytest.mark.parametrize("address", CLOSED)
def test_what_is_not_the_public_internet_is_refused(address: str) -> None:
    with pytest.raises(guard.UrlRefused, match="does not lead to a public address"):
        guard.parse(_url_of(address), NOTHING_MORE)
    with pytest.raises(guard.UrlRefused):
        guard.require_open("a.example", ["8.8.8.8", address], NOTHING_MORE)  # one such answer is one too many


@pytest.mark.parametrize("address", OPEN)
def test_public_addresses_are_open(address: str) -> None:
    guard.parse(_url_of(address), NOTHING_MORE)
    guard.require_open("a.example", [address], NOTHING_MORE)


@pytest.mark.parametrize("host", MALFORMED)
@pytest.mark.parametrize("settings", [NOTHING_MORE, LOOPBACK])
def test_a_host_in_an_odd_form_is_refused(host: str, settings: WebhookSettings) -> None:
    with pytest.raises(guard.UrlRefused):
        guard.parse(f"http://{host}/hooks", settings)


@pytest.mark.parametrize("host", PUBLIC_NAMES)
def test_plain_names_may_be_given(host: str) -> None:
    assert guard.parse(f"https://{host}:8443/hooks?team=a", NOTHING_MORE).raw_path == b"/hooks?team=a"


@pytest.mark.parametrize("url", NO_PLAIN_URLS)
def test_a_url_that_is_no_plain_one_is_refused(url: str) -> None:
    with pytest.raises(guard.UrlRefused):
        guard.parse(url, LOOPBACK)


@pytest.mark.parametrize("url", ["http://8.8.8.8#@127.0.0.1/", "http://8.8.8.8?@127.0.0.1/", "HTTP://8.8.8.8:00080/@127.0.0.1"])
def test_what_only_looks_like_another_host_is_not_gone_to(url: str) -> None:
    assert guard.parse(url, NOTHING_MORE).raw_host == b"8.8.8.8"


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.0.1", "::1"])
def test_loopback_opens_by_its_setting_and_opens_nothing_else(address: str) -> None:
    guard.parse(_url_of(address), LOOPBACK)
    for other in set(CLOSED) - {"127.0.0.1", "127.255.255.255", "::1", "0000::1"}:
        with pytest.raises(guard.UrlRefused):
            guard.parse(_url_of(other), LOOPBACK)


def test_an_allowed_host_opens_that_host_alone() -> None:
    settings = WebhookSettings(allowed_hosts=frozenset({"Hooks.Internal", "10.0.0.5"}))

    guard.require_open("hooks.internal", ["10.0.0.1", "fd00::1"], settings)
    guard.parse("http://10.0.0.5:8080/", settings)
    for host in ("a.hooks.internal", "hooks.internal.example", "internal"):
        with pytest.raises(guard.UrlRefused):
            guard.require_open(host, ["10.0.0.1"], settings)
    with pytest.raises(guard.UrlRefused):
        guard.parse("http://10.0.0.6/", settings)


class Recorder(httpcore.AsyncNetworkBackend):
    """The network, as far as the guard sees it: remembers where the guard connects and lets some addresses be dead."""

    def __init__(self, *dead: str) -> None:
        self.tried = list[str]()
        self._dead = dead

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        self.tried.append(host)
        if host in self._dead:
            raise httpcore.ConnectError("dead")
        return httpcore.AsyncNetworkStream()


def test_a_name_that_changes_its_answer_is_connected_to_where_it_was_checked() -> None:
    network, answers = Recorder(), [["93.184.216.34"], ["127.0.0.1"], ["127.0.0.1"]]

    _connect(network, lambda _: answers.pop(0))
    assert (network.tried, len(answers)) == (["93.184.216.34"], 2)  # asked once

    with pytest.raises(guard.UrlRefused):  # and the next attempt asks and checks again
        _connect(network, lambda _: answers.pop(0))
    assert network.tried == ["93.184.216.34"]


@pytest.mark.parametrize(
    "answers",
    [["8.8.8.8", "10.0.0.1"], ["fe80::1%2"], ["2606:4700::1%eth0"], ["::ffff:169.254.169.254", "8.8.8.8"], ["nonsense"]],
)
def test_one_closed_address_among_the_answers_closes_the_name(answers: Sequence[str]) -> None:
    network = Recorder()

    with pytest.raises(guard.UrlRefused) as refused:
        _connect(network, lambda _: answers)
    assert network.tried == []
    assert not any(address in str(refused.value) for address in answers)  # nobody maps our network with this


def test_a_dead_address_leaves_the_next_its_chance() -> None:
    network = Recorder("2606:4700:4700::1111")

    _connect(network, lambda _: ["2606:4700:4700::1111", "1.1.1.1"])
    assert network.tried == ["2606:4700:4700::1111", "1.1.1.1"]

    with pytest.raises(httpcore.ConnectError, match="dead"):
        _connect(network, lambda _: ["2606:4700:4700::1111"])


def test_a_name_without_addresses_is_told_from_a_closed_one_only_if_the_operator_has_allowed_it() -> None:
    def unknown(host: str) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    told = set()
    for resolve in (unknown, lambda _: [], lambda _: ["10.0.0.1"]):
        with pytest.raises(guard.UrlRefused, match="does not lead to a public address") as refused:
            _connect(Recorder(), resolve)
        told.add(str(refused.value))
    assert len(told) == 1  # else names that only our network knows could be guessed

    with pytest.raises(httpcore.ConnectError, match="does not resolve"):
        _connect(Recorder(), unknown, settings=WebhookSettings(allowed_hosts=frozenset({"hooks.example"})))


def test_the_machine_itself_resolves_to_loopback() -> None:
    assert "127.0.0.1" in guard.resolve("localhost")
    with pytest.raises(guard.UrlRefused):
        _connect(Recorder(), guard.resolve, host="localhost")


def _connect(
    network: Recorder, resolve: guard.Resolve, *, host: str = "hooks.example", settings: WebhookSettings = NOTHING_MORE
) -> None:
    with ThreadPoolExecutor(1) as threads:
        asyncio.run(guard.GuardedNetwork(settings, resolve, threads, network).connect_tcp(host, 443))


def _url_of(address: str) -> str:
    return f"http://[{address}]:8080/hooks" if ":" in address else f"http://{address}:8080/hooks"
