"""Proxies whose ``X-Forwarded-For`` is believed: their addresses, checked at start. uvicorn reads the header."""

import ipaddress
from collections.abc import Sequence

from rbee_worker.errors import InvalidRequest

_MAPPED_BITS = 96
"""Bits before an IPv4 address where a socket of IPv6 shows it (RFC 4291, section 2.5.5.2)."""


def proxy_networks(values: Sequence[str]) -> list[str]:
    """Check the values of ``--trusted-proxy``, addresses or networks such as 10.0.0.0/8.

    Returns:
        The networks as uvicorn takes them; those of IPv4 also as a socket of both families shows them.

    Raises:
        InvalidRequest: a value is neither.
    """
    networks = []
    for value in values:
        try:
            network = ipaddress.ip_network(value)
        except ValueError as error:
            raise InvalidRequest(
                f"--trusted-proxy {value!r} is no address: {error}.",
                hint="Write an address such as 10.0.0.7, or a network such as 10.0.0.0/8.",
            ) from None
        networks.append(str(network))
        if network.version == 4:  # noqa: PLR2004 - of the protocol
            networks.append(f"::ffff:{network.network_address}/{_MAPPED_BITS + network.prefixlen}")
    return networks
