"""address: which network addresses a webhook may reach (pure).

Owns: the list of networks that are not the public internet, and the addresses that are wrapped inside others. A name that an outsider
controls may point into the local network (server-side request forgery), so an address is judged after the name was resolved, and the
call then goes to that very address. Fails with `Refused`.
Python's own `is_global` differs between the versions that we support (CVE-2024-4032), hence a list of our own, after the registries of
special addresses (iana.org/assignments/iana-ipv4-special-registry, iana-ipv6-special-registry).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from whisperd.errors import WhisperdError, printable

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

NOT_PUBLIC_4 = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24",
        "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    )
)  # fmt: skip
GLOBAL_UNICAST_6 = IPv6Network("2000::/3")  # everything else is local, multicast, reserved or unassigned
NOT_PUBLIC_6 = tuple(IPv6Network(text) for text in ("2001::/23", "2001:db8::/32", "3fff::/20"))

MAPPED = IPv6Network("::ffff:0:0/96")
NAT64 = IPv6Network("64:ff9b::/96")
SIX_TO_FOUR = IPv6Network("2002::/16")
TEREDO = IPv6Network("2001::/32")


class Refused(WhisperdError):
    """No address of the webhook may be called."""

    code = "address_refused"


def permitted(host: str, found: Iterable[str], allow: Iterable[str]) -> tuple[str, ...]:
    """Those of the addresses found for `host` that may be called: public ones, and what lies in a network of `allow`. Raises Refused."""
    networks = [ip_network(network) for network in allow]
    addresses = tuple(dict.fromkeys(found))
    good = tuple(address for address in addresses if may_be_called(ip_address(address), networks))
    if not good:
        shown = ", ".join(addresses) or "nothing"
        raise Refused(
            f"cannot call {printable(host)}: it is {shown}, which is not a public address",
            hint='if it is meant to be called, name its network in `allow` of that [[webhook]], as "192.168.1.0/24"',
        )
    return good


def may_be_called(address: Address, allow: Iterable[Network]) -> bool:
    """Whether every address that a packet to this one reaches is public or allowed."""
    networks = tuple(allow)
    if _within(address, networks):
        return True
    inside = list(_wrapped(address))
    if inside:
        return all(_within(inner, networks) or _public(inner) for inner in inside)
    return _public(address)


def _within(address: Address, networks: Iterable[Network]) -> bool:
    return any(address.version == network.version and int(address) in _span(network) for network in networks)


def _span(network: Network) -> range:
    return range(int(network.network_address), int(network.broadcast_address) + 1)


def _public(address: Address) -> bool:
    if isinstance(address, IPv4Address):
        return not _within(address, NOT_PUBLIC_4)
    return _within(address, (GLOBAL_UNICAST_6,)) and not _within(address, NOT_PUBLIC_6)


def _wrapped(address: Address) -> Iterator[IPv4Address]:
    """The IPv4 addresses to which a packet to this IPv6 address is forwarded by a translator or a tunnel."""
    if isinstance(address, IPv4Address):
        return
    bits = int(address)
    if _within(address, (MAPPED, NAT64)):
        yield IPv4Address(bits & 0xFFFFFFFF)
    elif _within(address, (SIX_TO_FOUR,)):
        yield IPv4Address(bits >> 80 & 0xFFFFFFFF)
    elif _within(address, (TEREDO,)):  # RFC 4380: the server in clear, the client inverted
        yield IPv4Address(bits >> 64 & 0xFFFFFFFF)
        yield IPv4Address(~bits & 0xFFFFFFFF)
