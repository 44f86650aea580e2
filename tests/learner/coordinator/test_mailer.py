from common.wire import Peer, SendResult
from learner.coordinator.mailer import MAX_KEPT_BYTES, MESSAGE_OVERHEAD_BYTES, Mailer

A, B = Peer(b"a", ""), Peer(b"b", "")


class OneWayRouter:
    """Takes messages only from open connections; remembers what it took."""

    def __init__(self):
        self.results = {}
        self.sent = []
        self.room = {}

    def send(self, peer, frames):
        result = self.results.get(peer, SendResult.SENT)
        if self.room.get(peer, 0):
            self.room[peer] -= 1
            result = SendResult.SENT
        if result is SendResult.SENT:
            self.sent.append((peer, frames[0]))
        return result

    def take(self, peer, num_messages):
        """From a connection that is full."""
        self.room[peer] = num_messages


def test_what_a_connection_does_not_take_is_sent_later_in_order_and_others_do_not_wait():
    router = OneWayRouter()
    mailer = Mailer(router)
    router.results[A] = SendResult.FULL
    for number in range(3):
        assert mailer.send(A, [b"%d" % number])
    assert mailer.send(B, [b"other"])
    mailer.retry()
    assert router.sent == [(B, b"other")]
    assert mailer.is_behind(A)
    router.results[A] = SendResult.SENT
    assert mailer.send(A, [b"3"])  # not before those that wait
    mailer.retry()
    assert router.sent[1:] == [(A, b"0"), (A, b"1"), (A, b"2"), (A, b"3")]
    assert not mailer.is_behind(A)


def test_what_is_kept_for_a_connection_is_bounded():
    router = OneWayRouter()
    mailer = Mailer(router)
    router.results[A] = SendResult.FULL
    message = [b"header", bytes((1 << 20) - len(b"header") - MESSAGE_OVERHEAD_BYTES)]
    assert all(mailer.send(A, message) for _ in range(MAX_KEPT_BYTES >> 20))
    assert not mailer.send(A, [b"x"])
    assert not mailer.is_behind(A)


def test_what_was_taken_makes_room():
    router = OneWayRouter()
    mailer = Mailer(router)
    router.results[A] = SendResult.FULL
    mailer.send(A, [bytes(MAX_KEPT_BYTES - MESSAGE_OVERHEAD_BYTES)])
    router.take(A, 1)
    mailer.send(A, [b"first"])
    mailer.retry()
    assert mailer.send(A, [b"second"])


def test_nothing_is_kept_for_a_connection_that_is_gone():
    router = OneWayRouter()
    mailer = Mailer(router)
    router.results[A] = SendResult.FULL
    mailer.send(A, [b"x"])
    router.results[A] = SendResult.GONE
    mailer.retry()
    assert not mailer.is_behind(A)
    assert mailer.send(A, [b"y"])
    assert not mailer.is_behind(A)
