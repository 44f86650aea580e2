"""Greeting: how a rollout server introduces itself to the learner, and reads what that says."""

import asyncio
import logging
import time
from contextlib import suppress

import msgspec

from common import messages
from common.codec import Decoder, ProtocolError, encode
from common.lifecycle import UserError
from common.wire import Dealer

logger = logging.getLogger(__name__)

HELLO_INTERVAL_S = 1.0
SAY_IT_EVERY_S = 5.0
MAX_HEADER_BYTES = 2 << 20  # a lease with the largest row, and what is said beside it

decoder = Decoder(messages.CoordinatorToServer, max_payload_bytes=0, max_header_bytes=MAX_HEADER_BYTES)


class RunFinishedError(Exception):
    """The learner said that the run is over."""


async def join(dealer: Dealer, hello: messages.Hello) -> messages.Welcome:
    """Introduce this server until the learner answers.

    Raises UserError when it does not want us, RunFinishedError when it needs nobody any more.
    """
    said_s = time.monotonic()
    while True:
        dealer.try_send(encode(said_now(hello)))
        with suppress(TimeoutError):
            async with asyncio.timeout(HELLO_INTERVAL_S):
                message = receive_message(await dealer.receive())
                if isinstance(message, messages.Welcome):
                    return message
                if isinstance(message, messages.Refused) and not message.retry:
                    raise UserError(f"the learner refuses this rollout server: {message.reason}")
                if isinstance(message, messages.Finished):
                    raise RunFinishedError(f"the run is finished: {message.reason}")
        if time.monotonic() - said_s > SAY_IT_EVERY_S:
            said_s = time.monotonic()
            logger.info("waiting for the learner at %s: is it running, and is the key one of its run?", dealer.address)


def said_now(hello: messages.Hello) -> messages.Hello:
    return msgspec.structs.replace(hello, said_us=time.monotonic_ns() // 1000)


def receive_message(frames: list[bytes | memoryview]) -> messages.Message | None:
    """None for what is not a message of this protocol version: it is logged, and ignored."""
    try:
        return decoder.decode(frames)[0]
    except ProtocolError as error:
        logger.warning("the learner sent what is not a message: %s", error)
        return None
