"""python -m whisperd.notifier: webhooks and hooks, for the daemon.

Owns: the life of the process: several notices at once, each in a thread, since a receiver may be slow; the wire is never kept waiting.
Each order is answered with Notified or NotifyFailed, in the order in which they come to an end. On Stop what is in hand has a moment;
hooks that have not ended by then are, and calls are left: the next notifier makes them again.
"""

from __future__ import annotations

import queue
import select
import socket
import sys
import threading
import time
from collections.abc import Iterable

from loguru import logger

from whisperd.log import to_parent
from whisperd.notifier import hook, webhook
from whisperd.vocabulary import Failure, FailureKind
from whisperd.wire import (
    CallWebhook,
    Channel,
    Notified,
    NotifierIn,
    NotifierReady,
    NotifyFailed,
    RunHook,
    ServeNotifier,
    Stop,
    WireBroken,
    WireClosed,
    join_daemon,
)

AT_ONCE = 4
STOP_GRACE_S = 2.0
STOP_KILL_S = hook.TERMINATE_S + 1.0

Order = CallWebhook | RunHook
Answer = Notified | NotifyFailed


def main() -> int:
    to_parent()
    channel: Channel[NotifierIn] = join_daemon(NotifierIn)
    try:
        serve(channel)
    except WireClosed:
        return 0
    except WireBroken as error:
        logger.error("the daemon did not keep to the protocol: {}", error)
        return 1
    return 0


class Crew:
    """The threads that carry out orders. `bell` becomes readable when an answer is there."""

    def __init__(self, number: int) -> None:
        self.bell, self._rope = socket.socketpair()
        self.bell.setblocking(False)
        self._rope.setblocking(False)
        self._stop = threading.Event()
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self.in_hand = 0
        for count in range(number):  # daemon threads: one that a receiver keeps does not keep the process
            threading.Thread(target=self._work, name=f"notice-{count}", daemon=True).start()

    def give(self, order: Order) -> None:
        self.in_hand += 1
        self._orders.put(order)

    def answers(self) -> Iterable[Answer]:
        """What has come to an end since the last look."""
        try:
            while self.bell.recv(4096):
                pass
        except BlockingIOError:
            pass
        while not self._answers.empty():
            self.in_hand -= 1
            yield self._answers.get()

    def interrupt(self) -> None:
        """End the hooks that run."""
        self._stop.set()

    def _work(self) -> None:
        while True:
            self._answers.put(carry_out(self._orders.get(), self._stop))
            try:
                self._rope.send(b".")
            except BlockingIOError:  # it rings already
                pass


def carry_out(order: Order, stop: threading.Event) -> Answer:
    """Do what one order asks, and say how it went."""
    try:
        if isinstance(order, CallWebhook):
            webhook.call(order, now=time.time())
        else:
            hook.run(order, stop=stop)
    except webhook.NotTold as error:
        return NotifyFailed(notice=order.notice, failure=error.failure, again_in_s=error.again_in_s)
    except hook.NotRun as error:
        return NotifyFailed(notice=order.notice, failure=error.failure)
    except Exception as error:  # noqa: BLE001 - a fault of ours met by one notice must not stop the telling of all others
        logger.error("cannot tell notice {}: {}", order.notice, type(error).__name__)  # its values may be secrets
        what = f"cannot tell: {type(error).__name__} in the notifier"
        failure = Failure(kind=FailureKind.TRANSIENT, code="internal", what=what, hint="please report it")
        return NotifyFailed(notice=order.notice, failure=failure)
    return Notified(notice=order.notice)


def serve(channel: Channel[NotifierIn]) -> None:
    """Carry out orders until Stop. Raises WireClosed, WireBroken."""
    crew = Crew(AT_ONCE)
    while True:
        readable, _, _ = select.select([channel.fileno(), crew.bell.fileno()], [], [])
        if crew.bell.fileno() in readable:
            tell(channel, crew)
        if channel.fileno() in readable and not obey(channel, crew):
            return finish(channel, crew)


def obey(channel: Channel[NotifierIn], crew: Crew) -> bool:
    """Take the frames that are there; False after Stop. Raises WireClosed, WireBroken."""
    for frame in channel.receive():
        match frame.message:
            case Stop():
                return False
            case ServeNotifier():
                channel.send_all(NotifierReady())
            case CallWebhook() | RunHook() as order:
                crew.give(order)
    return True


def tell(channel: Channel[NotifierIn], crew: Crew) -> None:
    for answer in crew.answers():
        channel.send_all(answer)


def finish(channel: Channel[NotifierIn], crew: Crew) -> None:
    """Let what is in hand end, for a moment; then end the hooks, and wait until they are gone. Raises WireClosed."""
    _await(channel, crew, STOP_GRACE_S)
    crew.interrupt()
    _await(channel, crew, STOP_KILL_S)


def _await(channel: Channel[NotifierIn], crew: Crew, wait_s: float) -> None:
    ends_at = time.monotonic() + wait_s
    while crew.in_hand and (left_s := ends_at - time.monotonic()) > 0:
        if select.select([crew.bell], [], [], left_s)[0]:
            tell(channel, crew)


if __name__ == "__main__":
    sys.exit(main())
