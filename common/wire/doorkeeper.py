"""Who may connect: answers ZeroMQ's question about each new connection (ZeroMQ RFC 27, ZAP) from the allow-list."""

import logging

from common.keys import AllowList, GivenKeys
from common.wire.refusals import Reason, Refusals

logger = logging.getLogger(__name__)

_LET_IN = b"200"
# "Temporarily": the connection is closed without a word, and the peer tries again, until its key is allowed perhaps.
# After a final refusal (400) ZeroMQ would not try again, and a server had to be restarted to be let in.
_REFUSED = b"300"


class Doorkeeper:
    """The decision about one connection after the other. The name a peer gets here is its proven public key, in hex."""

    def __init__(self, allowed: AllowList | GivenKeys, refusals: Refusals) -> None:
        self._allowed = allowed
        self._refusals = refusals
        self._let_in: dict[str, str] = {}  # keys of connections that may still be there, by their names
        self._missing: frozenset[str] = frozenset()  # not on the allow-list when it was last looked at
        self.revoked: frozenset[str] = frozenset()  # keys that were let in and may not be here any more

    def answer(self, request: list[bytes]) -> list[bytes]:
        """The reply to a request for one connection."""
        version, request_id, _domain, address, _routing_id, mechanism, *credentials = request
        name = self._allowed.name_of(credentials[0]) if mechanism == b"CURVE" else None
        if name is not None:
            key = credentials[0].hex()
            self._let_in[key] = name
            self._missing -= {key}
            self.revoked -= {key}
            return [version, request_id, _LET_IN, b"OK", key.encode(), b""]
        key = credentials[0].hex()[:8] if mechanism == b"CURVE" else "none"
        self._refusals.note(Reason.STRANGER, f"from {address.decode()} with key {key}; {self._allowed}")
        return [version, request_id, _REFUSED, b"not on the allow-list", b"", b""]

    def look(self) -> None:
        """Find out which keys were revoked: those missing now and at the look before.

        Once is not enough: a file may be replaced at this moment. A list that cannot be read revokes nothing.
        """
        allowed = self._allowed.names()
        if allowed is None:
            return
        missing = frozenset(self._let_in.keys() - {public.hex() for public in allowed})
        for key in sorted((missing & self._missing) - self.revoked):
            logger.warning(
                "the key %s (%s...) is not allowed any more: its connections end", self._let_in[key], key[:8]
            )
        self.revoked = missing & self._missing
        self._missing = missing
