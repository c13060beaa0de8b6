"""webhook: one signed call of a webhook.

Owns: every network connection of whisperd at run time but the fetching of a model. A call is a POST of JSON, signed as
https://www.standardwebhooks.com says. The name is resolved once, its addresses are judged (`address`), and the connection is made to
one that passed: a second resolution could give another answer (DNS rebinding). No redirect is followed, no proxy is taken from the
environment, https is verified against the system's certificates, and nothing of the answer is kept but its status, and when it asks to
be called again. Fails with `NotTold`.

What is tried again: everything but 410 (the receiver says that it is gone for good), an address that is refused, and a setting that
cannot be used. 400, 401, 403 and 404 as well: receivers are deployed late, their secrets are changed, and then the notice is still
wanted; `attempts_max` bounds it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from ipaddress import ip_address
from typing import NamedTuple
from urllib.parse import unquote

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, LocationParseError
from urllib3.util import parse_url

from whisperd import __version__
from whisperd.errors import WhisperdError, printable
from whisperd.notifier.address import Refused, permitted
from whisperd.vocabulary import Failure, FailureKind
from whisperd.wire import CallWebhook

SECRET_PREFIX = "whsec_"
GONE = 410
BUSY = (429, 503)
"""Answers of which Retry-After says when to come again (RFC 6585 §4, RFC 9110 §15.6.4)."""
AGAIN_MAX_S = 1e9  # the daemon bounds it; this is what the wire can carry, which knows no infinity
REASON_CHARS = 80

Resolver = Callable[[str, int], list[str]]


class NotTold(WhisperdError):
    """The webhook did not take the notice."""

    def __init__(self, kind: FailureKind, code: str, what: str, hint: str = "", *, again_in_s: float = 0.0) -> None:
        super().__init__(what, hint=hint)
        self.failure = Failure(kind=kind, code=code, what=what, hint=hint)
        self.again_in_s = again_in_s


class Answer(NamedTuple):
    """What is kept of an answer: its status and its words, and after how long it asks to be called again (0: it does not)."""

    status: int
    reason: str
    again_in_s: float


class Place(NamedTuple):
    """A URL in its parts. `host` is what its certificate must be for; `shown` has nothing of the URL that could be a secret."""

    tls: bool
    host: str
    port: int
    resource: str
    login: str | None

    @property
    def shown(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return printable(f"{'https' if self.tls else 'http'}://{host}:{self.port}")


def call(order: CallWebhook, *, now: float, resolve: Resolver | None = None) -> None:
    """Tell one webhook; returns once it said 2xx. Raises NotTold."""
    place = place_of(order.url)
    headers = headers_of(order, now=now)
    if place.login:
        headers["Authorization"] = "Basic " + base64.b64encode(unquote(place.login).encode()).decode()
    ends_at = time.monotonic() + order.timeout_s
    try:
        found = (resolve or addresses_of)(place.host, place.port)
        line = _connect(place, permitted(place.host, found, order.allow), ends_at)
        answer = _post(place, line, headers, order.body, ends_at, now=now)
    except Refused as error:
        raise NotTold(FailureKind.PERMANENT, error.code, error.what, error.hint) from error
    except ssl.SSLCertVerificationError as error:
        what = f"cannot call {place.shown}: its certificate cannot be trusted: {error.verify_message}"
        raise NotTold(
            FailureKind.TRANSIENT, "certificate_refused", what, "have it signed by an authority that this system trusts"
        ) from error
    except (OSError, HTTPError, HTTPException) as error:
        raise _unanswered(place, error, late=time.monotonic() >= ends_at, timeout_s=order.timeout_s) from error
    _judge(place, answer)


# --- what is sent ---


def place_of(url: str) -> Place:
    """The parts of a URL. Raises NotTold."""
    unusable = NotTold(FailureKind.PERMANENT, "url_unusable", "cannot call a webhook: its url cannot be read", "correct `url` of it")
    try:
        parts = parse_url(url)
        (parts.host or "").encode("idna")
    except (LocationParseError, UnicodeError) as error:  # its text holds the URL, which may hold a secret
        raise unusable from error
    if parts.scheme not in ("http", "https") or not parts.host:
        raise unusable
    tls = parts.scheme == "https"
    host = parts.host.removeprefix("[").removesuffix("]")
    return Place(tls, host, parts.port or (443 if tls else 80), parts.request_uri, parts.auth)


def headers_of(order: CallWebhook, *, now: float) -> dict[str, str]:
    """The headers of one attempt: the delivery's id stays, the time is the attempt's. Raises NotTold."""
    sent_at = str(int(now))
    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"whisperd/{__version__}",
        "Connection": "close",
        "webhook-id": order.delivery,
        "webhook-timestamp": sent_at,
    }
    if order.secret:
        headers["webhook-signature"] = signature(key_of(order.secret), order.delivery, sent_at, order.body)
    return headers


def key_of(secret: str) -> bytes:
    """The key that a secret stands for: "whsec_" and base64, or the text itself. Raises NotTold."""
    if not secret.startswith(SECRET_PREFIX):
        return secret.encode("utf-8", "surrogateescape")
    try:
        return base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError) as error:
        what = f"cannot sign a webhook: what follows {SECRET_PREFIX} in its secret is not base64"
        raise NotTold(FailureKind.PERMANENT, "secret_unusable", what, "correct `secret` of that [[webhook]]") from error


def signature(key: bytes, delivery: str, sent_at: str, body: bytes) -> str:
    """The value of webhook-signature: version 1, HMAC-SHA256 over id, time and body."""
    signed = b".".join((delivery.encode(), sent_at.encode(), body))
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


# --- the connection ---


def addresses_of(host: str, port: int) -> list[str]:
    """The addresses of a name as this system resolves it, the best first. Raises OSError."""
    return [str(ip_address(str(entry[4][0]).partition("%")[0])) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _connect(place: Place, addresses: tuple[str, ...], ends_at: float) -> socket.socket:
    """A connection to the first of the addresses that answers; addresses only, so nothing is resolved here. Raises OSError."""
    last: OSError = TimeoutError("no time was left to connect")
    for number, address in enumerate(addresses):
        left_s = ends_at - time.monotonic()
        if left_s <= 0:
            break
        try:
            return socket.create_connection((address, place.port), timeout=left_s / (len(addresses) - number))
        except OSError as error:
            last = error
    raise last


class _Plain(HTTPConnection):
    line: socket.socket

    def _new_conn(self) -> socket.socket:  # the seam that urllib3's own SOCKS support uses
        return self.line


class _Tls(HTTPSConnection):
    line: socket.socket

    def _new_conn(self) -> socket.socket:
        return self.line


def _post(place: Place, line: socket.socket, headers: dict[str, str], body: bytes, ends_at: float, *, now: float) -> Answer:
    """One request over a connection that is there. Raises OSError, HTTPError, HTTPException."""
    left_s = max(0.001, ends_at - time.monotonic())
    connection: _Plain | _Tls
    if place.tls:
        connection = _Tls(place.host, place.port, timeout=left_s, ssl_context=ssl.create_default_context())
    else:
        connection = _Plain(place.host, place.port, timeout=left_s)
    connection.line = line
    with line, _ended_after(line, left_s) as late:
        try:
            connection.request("POST", place.resource, body=body, headers=headers, preload_content=False)
            answer = connection.getresponse()
            if late.is_set():  # half a header may pass for a whole one
                raise TimeoutError
            again_in_s = pause_asked_s(answer.headers.get("Retry-After", ""), answer.headers.get("Date", ""), now=now)
            return Answer(answer.status, answer.reason or "", again_in_s if answer.status in BUSY else 0.0)
        finally:
            connection.close()


@contextmanager
def _ended_after(line: socket.socket, left_s: float) -> Iterator[threading.Event]:
    """A socket's own timeout is for each read; one byte now and then would keep us for ever. This ends the whole connection."""
    line.settimeout(left_s)
    late = threading.Event()
    with line.dup() as twin:  # `line` itself is taken over by TLS

        def hang_up() -> None:
            late.set()
            try:
                twin.shutdown(socket.SHUT_RDWR)
            except OSError:  # it is over already
                pass

        alarm = threading.Timer(left_s, hang_up)
        alarm.daemon = True
        alarm.start()
        try:
            yield late
        finally:
            alarm.cancel()
            alarm.join()


# --- what came of it ---


def _unanswered(place: Place, error: Exception, *, late: bool, timeout_s: float) -> NotTold:
    if late or isinstance(error, TimeoutError):
        what = f"cannot call {place.shown}: no answer within {timeout_s:g} s"
        return NotTold(FailureKind.TRANSIENT, "webhook_timeout", what, "look whether it works; it is tried again")
    if isinstance(error, socket.gaierror):
        what = f"cannot call {place.shown}: the name cannot be resolved: {error.strerror}"
        return NotTold(FailureKind.TRANSIENT, "name_unresolved", what, "look whether the name is right and the network is there")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    what = f"cannot call {place.shown}: {printable(reason)}"
    return NotTold(FailureKind.TRANSIENT, "webhook_unreachable", what, "look whether it works; it is tried again")


def pause_asked_s(asked: str, sent: str, *, now: float) -> float:
    """The pause that a Retry-After asks for, seconds or a date (RFC 9110 §10.2.3); 0 for one that is past or cannot be read.

    A date is held against the receiver's own clock (the answer's Date, in `sent`) where that is known, else against ours (`now`).
    """
    asked = asked.strip()
    if asked.isascii() and asked.isdigit():
        return min(float(asked), AGAIN_MAX_S)
    until, its_now = _moment(asked), _moment(sent)
    return 0.0 if until is None else min(max(0.0, until - (now if its_now is None else its_now)), AGAIN_MAX_S)


def _moment(date: str) -> float | None:
    """An HTTP date in seconds since 1970; None for what is none."""
    try:
        found = parsedate_to_datetime(date)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def _judge(place: Place, answer: Answer) -> None:
    """2xx is told. Raises NotTold."""
    status = answer.status
    if 200 <= status < 300:
        return
    what = f"{place.shown} answered {status} {printable(answer.reason[:REASON_CHARS])}".rstrip()
    if status == GONE:
        raise NotTold(FailureKind.PERMANENT, "webhook_gone", what, "it asks not to be called any more: remove that [[webhook]]")
    if 300 <= status < 400:
        hint = "redirects are not followed: name the address it points to in `url`"
    elif 400 <= status < 500:
        hint = "look whether `url` and `secret` are what the receiver expects; it is tried again"
    else:
        hint = "look what the receiver says of it; it is tried again"
    raise NotTold(FailureKind.TRANSIENT, "webhook_refused", what, hint, again_in_s=answer.again_in_s)
