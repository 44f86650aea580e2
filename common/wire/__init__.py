"""Sockets: the one package that names ZeroMQ. Routers bind, dealers connect, frames travel, nothing is interpreted.

ZeroMQ's own asyncio layer costs about 20 us a message; here a socket is drained without blocking when its descriptor
fires. What one end cannot take is reported to the sender, which keeps it and sends it again: nothing is dropped.

What an honest peer can make us hold is bounded by credit (leases) in the layer above. For a dishonest one, every frame
and the messages waiting per connection are bounded, but ZeroMQ collects a message of endlessly many frames before it
shows any of it. With keys only those on the allow-list can send one; a memory limit on the process is the last resort.
"""

from common.wire.addresses import WireError, is_local
from common.wire.opening import open_dealer, open_router
from common.wire.options import curve_keypair
from common.wire.sockets import Dealer, Incoming, Peer, Router, SendResult

__all__ = [
    "Dealer",
    "Incoming",
    "Peer",
    "Router",
    "SendResult",
    "WireError",
    "curve_keypair",
    "is_local",
    "open_dealer",
    "open_router",
]
