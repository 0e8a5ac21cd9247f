"""Which hosts images may come from, and which network addresses are public."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_PORTS = {"http": 80, "https": 443}
# Networks whose addresses stand for an IPv4 address, which the last bits spell.
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# What is_global of some versions of Python lets through: relays to any IPv4 address, and local use.
# And one that is public by its number, and to a machine in Azure the one that hands out its secrets.
REFUSED = tuple(
    ipaddress.ip_network(name)
    for name in [
        "2002::/16",
        "2001::/32",
        "64:ff9b:1::/48",
        "192.0.0.0/24",
        "192.88.99.0/24",
        "fec0::/10",
        "::/96",
        "168.63.129.16/32",
    ]
)
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?|[0-9a-f:.]+")


@dataclass(frozen=True)
class Address:
    """Where an image lies.

    Attributes:
        scheme: "http" or "https".
        host: lower case, without a dot at its end.
        port: of TCP.
        target: path and query.
    """

    scheme: str
    host: str
    port: int
    target: str

    @property
    def host_header(self) -> str:
        """The host as a request names it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def parse_address(url: str) -> Address:
    """Take an address apart.

    Raises:
        ValueError: it is not one that an image could be downloaded from, and why.
    """
    if len(url) > 8192 or any(ord(letter) <= 32 or ord(letter) == 127 for letter in url):
        raise ValueError("it is too long, or holds blanks")
    parts = urlsplit(url)
    if parts.scheme not in DEFAULT_PORTS:
        raise ValueError("it is neither http nor https")
    if parts.username is not None or parts.password is not None or "@" in parts.netloc or "\\" in url:
        raise ValueError("it holds a user name")
    try:
        host = (parts.hostname or "").rstrip(".").encode("idna").decode().lower()
    except UnicodeError as error:
        raise ValueError("its host is not a name") from error
    if not _HOST.fullmatch(host):
        raise ValueError("it has no host that could be asked")
    target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe="%/:=&?~+!$,;'@()*[]")
    return Address(parts.scheme, host, parts.port or DEFAULT_PORTS[parts.scheme], target)


def is_allowed(address: Address, domains: Sequence[str]) -> bool:
    """Whether the operator named the host of an address, and its port where it is not the usual one."""
    has_usual_port = address.port == DEFAULT_PORTS[address.scheme]
    for domain in domains:
        name, _, port = domain.lower().rpartition(":") if re.search(r":\d+$", domain) else (domain.lower(), "", "")
        is_host = address.host == name or (name.startswith("*.") and address.host.endswith(name[1:]))
        if is_host and (has_usual_port if not port else address.port == int(port)):
            return True
    return False


def is_public(text: str) -> bool:
    """Whether an IP address belongs to a host of the internet, and not to this machine or a network around it."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        # Among others one that names an interface of this machine.
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(str(address.ipv4_mapped))
        if address in NAT64:
            return is_public(str(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)))
    if any(address in network for network in REFUSED if network.version == address.version):
        return False
    is_special = address.is_multicast or address.is_reserved or address.is_unspecified
    return address.is_global and not (is_special or address.is_loopback or address.is_link_local)
