"""notifier: the real process over the real wire, real receivers on this machine, real programs; and the address rules by themselves."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import os
import signal
import socket
import ssl
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from whisperd.child import Child
from whisperd.config import Settings
from whisperd.dispatcher.notices import IN_FLIGHT_OF_ONE_MAX, LOOK_AT_MAX, Notices, Told, bodies, targets
from whisperd.dispatcher.nursery import Nursery
from whisperd.ledger.ledger import Ledger
from whisperd.notifier import webhook
from whisperd.notifier.address import Refused, may_be_called, permitted
from whisperd.notifier.webhook import NotTold
from whisperd.vocabulary import Failure, FailureKind, JobOptions, Sighting
from whisperd.wire import CallWebhook, Message, Notified, NotifierOut, NotifierReady, NotifyFailed, RunHook, ServeNotifier, Stop

HERE = ("127.0.0.0/8",)
SECRET = "whsec_" + base64.b64encode(b"an old key of these tests").decode()
BODY = b'{"schema":"whisperd.notice/1","path":"a.wav"}'
PATIENCE_S = 20.0


def until(condition: Callable[[], Any], what: str) -> Any:
    ends_at = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < ends_at, f"never: {what}"
        time.sleep(0.01)
    return found


class Receiver:
    """A web server on this machine that keeps what it was sent and answers as it is told."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.calls: list[tuple[str, dict[str, str], bytes]] = []
        self.status = 204
        self.headers: dict[str, str] = {}
        self.go = threading.Event()
        self.go.set()
        receiver = self

        class Desk(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.calls.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
                receiver.go.wait(60.0)
                self.send_response(receiver.status, "in \x1b[31m red")
                for name, value in receiver.headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:  # a caller that hung up
                pass

        self.server = Server(("127.0.0.1", 0), Desk)
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}/path?key=value"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.go.set()
        self.server.shutdown()
        self.server.server_close()


class Notifier:
    """The daemon's side of one notifier."""

    def __init__(self, **env: str) -> None:
        self.child: Child[NotifierOut] = Child(name="notifier", module="whisperd.notifier", receives=NotifierOut, now=0.0, env=env)
        self.child.send(ServeNotifier())
        self.waiting: list[NotifierOut] = []
        assert isinstance(self.hear(), NotifierReady)

    def hear(self) -> NotifierOut:
        while not self.waiting:
            frames = self.child.channel.wait(PATIENCE_S)
            assert frames, "the notifier says nothing"
            self.waiting += [frame.message for frame in frames]
        return self.waiting.pop(0)

    def ask(self, order: Message) -> NotifierOut:
        self.child.send(order)
        return self.hear()

    def end(self) -> str:
        self.child.drain(0.0)
        return self.child.gone(0.0)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.close()


@pytest.fixture(scope="module")
def notifier() -> Iterator[Notifier]:
    """One for all tests that leave it alive: it keeps nothing from order to order."""
    found = Notifier(http_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9", WHISPERD_NOT_FOR_HOOKS="1")
    yield found
    assert found.end() == "ended normally"


def a_call(url: str, *, notice: int = 1, allow: tuple[str, ...] = HERE, secret: str = SECRET, timeout_s: float = 10.0) -> CallWebhook:
    return CallWebhook(notice=notice, url=url, secret=secret, delivery="msg_1", body=BODY, allow=allow, timeout_s=timeout_s)


def failure(answer: NotifierOut) -> Any:
    assert isinstance(answer, NotifyFailed), answer
    return answer.failure


# --- webhooks ---


@pytest.mark.parametrize("secret, key", [(SECRET, b"an old key of these tests"), ("any text", b"any text")])
def test_a_call_is_signed_so_that_the_receiver_can_verify_it(notifier: Notifier, receiver: Receiver, secret: str, key: bytes) -> None:
    """POST of the very body; id, time and HMAC as standardwebhooks.com says; no proxy of the environment is asked."""
    assert notifier.ask(a_call(receiver.url, secret=secret, notice=7)) == Notified(notice=7)
    ((path, headers, body),) = receiver.calls
    assert (path, body, headers["content-type"]) == ("/path?key=value", BODY, "application/json")
    assert headers["host"] == f"127.0.0.1:{receiver.port}" and headers["webhook-id"] == "msg_1"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    signed = f"msg_1.{headers['webhook-timestamp']}.".encode() + BODY
    assert headers["webhook-signature"] == "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def test_the_signature_is_that_of_the_specification() -> None:
    """The example that the reference libraries of standardwebhooks.com test themselves with."""
    key = webhook.key_of("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    found = webhook.signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", b'{"test": 2432232314}')
    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_without_a_secret_a_call_is_unsigned(notifier: Notifier, receiver: Receiver) -> None:
    """The delivery id is there all the same."""
    assert isinstance(notifier.ask(a_call(receiver.url, secret="")), Notified)
    headers = receiver.calls[0][1]
    assert "webhook-signature" not in headers and headers["webhook-id"] == "msg_1"


def test_a_name_and_a_password_in_the_url_are_sent_and_never_shown(notifier: Notifier, receiver: Receiver) -> None:
    """Neither they nor the path and query, which may be secrets, appear in a failure."""
    receiver.status = 503
    found = failure(notifier.ask(a_call(receiver.url.replace("http://", "http://me:hush%40%C3%A4@"))))
    assert receiver.calls[0][1]["authorization"] == "Basic " + base64.b64encode("me:hush@ä".encode()).decode()
    assert not any(word in found.what + found.hint for word in ("hush", "me:", "path", "key="))


@pytest.mark.parametrize(
    "status, kind",
    [
        (200, None),
        (202, None),
        (410, "permanent"),
        *((status, "transient") for status in (301, 307, 400, 401, 403, 404, 408, 429, 500, 503)),
    ],
)
def test_2xx_is_told_410_is_final_and_all_else_is_tried_again(
    notifier: Notifier, receiver: Receiver, status: int, kind: str | None
) -> None:
    """A receiver that is wrong today may be right tomorrow, and its words are shown without their control bytes."""
    receiver.status = status
    answer = notifier.ask(a_call(receiver.url))
    assert len(receiver.calls) == 1
    if kind is None:
        assert isinstance(answer, Notified)
    else:
        found = failure(answer)
        assert (found.kind, str(status) in found.what, "\x1b" in found.what) == (kind, True, False)


@pytest.mark.parametrize(
    ("status", "headers", "asked_s"),
    [
        (429, {"Retry-After": "120"}, 120),
        (503, {"Retry-After": " 7 "}, 7),
        (503, {"Retry-After": "9" * 400}, 1e9),
        (503, {"Retry-After": "soon"}, 0),
        (503, {}, 0),
        (500, {"Retry-After": "120"}, 0),  # it means something with 429 and 503 only
    ],
)
def test_a_receiver_may_ask_for_a_pause(
    notifier: Notifier, receiver: Receiver, status: int, headers: dict[str, str], asked_s: float
) -> None:
    """Retry-After travels with the failure; what cannot be read is as if nothing was asked."""
    receiver.status, receiver.headers = status, headers
    answer = notifier.ask(a_call(receiver.url))
    assert failure(answer).code == "webhook_refused"
    assert isinstance(answer, NotifyFailed) and answer.again_in_s == asked_s


NOW, ITS_NOW = "Wed, 21 Oct 2015 07:27:00 GMT", "Wed, 21 Oct 2015 09:00:00 GMT"


@pytest.mark.parametrize(
    ("asked", "sent", "found_s"),
    [
        ("0", "", 0.0),
        ("9" * 400, "", 1e9),
        ("Wed, 21 Oct 2015 07:28:00 GMT", "", 60.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", NOW, 60.0),
        ("Wed, 21 Oct 2015 09:00:30 GMT", ITS_NOW, 30.0),  # its clock is ahead of ours
        ("Wed, 21 Oct 2015 07:28:00 GMT", "yesterday", 60.0),
        ("Wednesday, 21-Oct-15 07:28:00 GMT", "", 60.0),  # the two obsolete forms
        ("Wed Oct 21 07:28:00 2015", "", 60.0),
        ("Wed, 21 Oct 2015 07:20:00 GMT", "", 0.0),  # it is past
        ("-5", "", 0.0),
        ("1.5", "", 0.0),
        ("\u0663", "", 0.0),
        ("Wed, 99 Oct 2015 07:28:00 GMT", "", 0.0),
        ("Fri, 31 Dec 99999 23:59:59 GMT", "", 0.0),
        ("", "", 0.0),
    ],
)
def test_what_a_retry_after_asks_for(asked: str, sent: str, found_s: float) -> None:
    """Seconds, or a date in each of the three forms of RFC 9110; what is neither asks for nothing."""
    now = datetime(2015, 10, 21, 7, 27, tzinfo=UTC).timestamp()
    assert webhook.pause_asked_s(asked, sent, now=now) == found_s


def test_a_redirect_is_not_followed(notifier: Notifier, receiver: Receiver) -> None:
    """It could lead to where no call may go: the address it names is not even looked at."""
    receiver.status, receiver.headers = 302, {"Location": f"http://127.0.0.1:{receiver.port}/elsewhere"}
    assert "redirects are not followed" in failure(notifier.ask(a_call(receiver.url))).hint
    assert [path for path, _, _ in receiver.calls] == ["/path?key=value"]


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0x7f000001", "2130706433", "0", "169.254.169.254"]
)
def test_a_private_address_is_refused_however_it_is_written(notifier: Notifier, receiver: Receiver, host: str) -> None:
    """Without `allow` no connection is made at all, and it is final."""
    found = failure(notifier.ask(a_call(f"http://{host}:{receiver.port}/", allow=())))
    assert (found.kind, found.code) == (FailureKind.PERMANENT, "address_refused") and "allow" in found.hint
    assert receiver.calls == []


def test_the_name_is_resolved_once_and_the_address_that_was_judged_is_called(receiver: Receiver) -> None:
    """DNS rebinding: the second answer of a hostile name server is never asked for. The Host header keeps the name."""
    asked: list[str] = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["10.0.0.1"]

    webhook.call(a_call(f"http://rebound.example:{receiver.port}/x"), now=0.0, resolve=resolve)
    assert (asked, receiver.calls[0][1]["host"]) == (["rebound.example"], f"rebound.example:{receiver.port}")


def test_of_several_addresses_only_those_are_called_that_may_be(receiver: Receiver) -> None:
    """A private one among them is left out; when nothing else is left, the call is refused."""
    called = a_call(f"http://several.example:{receiver.port}/", timeout_s=PATIENCE_S)
    webhook.call(called, now=0.0, resolve=lambda host, port: ["10.255.255.1", "::1", "127.0.0.1"])
    assert len(receiver.calls) == 1
    with pytest.raises(NotTold) as refused:
        webhook.call(called, now=0.0, resolve=lambda host, port: ["10.255.255.1", "::1"])
    assert refused.value.failure.code == "address_refused"


def test_a_receiver_that_is_not_there_is_tried_again(notifier: Notifier, receiver: Receiver) -> None:
    """Refused connections and unknown names are passing failures."""
    receiver.close()
    assert failure(notifier.ask(a_call(receiver.url))).kind is FailureKind.TRANSIENT
    found = failure(notifier.ask(a_call("http://nobody.invalid/")))
    assert (found.kind, found.code) == (FailureKind.TRANSIENT, "name_unresolved")


@pytest.mark.parametrize("url", ["http://", "http://[::1", "ftp://127.0.0.1/", "http://127.0.0.1:99999/", f"http://{'a' * 64}.example/"])
def test_a_url_that_cannot_be_used_is_final(notifier: Notifier, url: str) -> None:
    """And so is a secret that is not what its prefix says."""
    found = failure(notifier.ask(a_call(url)))
    assert (found.kind, found.code) == (FailureKind.PERMANENT, "url_unusable")
    assert failure(notifier.ask(a_call("http://127.0.0.1/", secret="whsec_not base64"))).code == "secret_unusable"


def test_a_slow_receiver_keeps_nobody_else_waiting(notifier: Notifier, receiver: Receiver, tmp_path: Path) -> None:
    """While three calls hang, others are made; each ends when its time is over."""
    receiver.go.clear()
    for notice in (1, 2, 3):
        notifier.child.send(a_call(receiver.url, notice=notice, timeout_s=PATIENCE_S))
    until(lambda: len(receiver.calls) == 3, "three calls at once")
    assert notifier.ask(RunHook(notice=4, command=("/bin/true",), environment={}, timeout_s=PATIENCE_S)) == Notified(notice=4)
    found = failure(notifier.ask(a_call(receiver.url, notice=5, timeout_s=0.2)))
    assert (found.kind, found.code) == (FailureKind.TRANSIENT, "webhook_timeout")
    receiver.go.set()
    assert {notifier.hear() for _ in range(3)} == {Notified(notice=notice) for notice in (1, 2, 3)}


def test_a_receiver_that_drips_is_hung_up_on(notifier: Notifier) -> None:
    """One byte now and then is never silent for long: the time limit is for the whole call."""
    server = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def drip() -> None:
        line, _ = server.accept()
        with line:
            try:
                line.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                while not over.wait(0.02):
                    line.sendall(b"x")
            except OSError:  # hung up
                over.set()

    dripper = threading.Thread(target=drip)
    dripper.start()
    found = failure(notifier.ask(a_call(f"http://127.0.0.1:{server.getsockname()[1]}/", timeout_s=0.5)))
    assert found.code == "webhook_timeout"
    assert over.wait(PATIENCE_S)
    dripper.join()
    server.close()


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A certificate for the name `told.example` and its key, in one file."""
    made = tmp_path / "told.pem"
    order = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=told.example"]
    names = ["-addext", "subjectAltName=DNS:told.example"]
    try:
        subprocess.run([*order, *names, "-keyout", made, "-out", tmp_path / "cert.pem"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    with made.open("a") as file:
        file.write((tmp_path / "cert.pem").read_text())
    return made


def test_https_is_verified_for_the_name_and_against_the_system_store(authority: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trusted and right: told. Trusted for another name, or not trusted: refused before anything is sent, and tried again."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(authority)
    receiver = Receiver(tls)

    def call(host: str) -> None:
        webhook.call(a_call(f"https://{host}:{receiver.port}/"), now=0.0, resolve=lambda host, port: ["127.0.0.1"])

    try:
        with pytest.raises(NotTold) as unknown:
            call("told.example")
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.parent / "cert.pem"))
        with pytest.raises(NotTold) as another:
            call("other.example")
        assert receiver.calls == []
        call("told.example")
        assert len(receiver.calls) == 1
    finally:
        receiver.close()
    assert [(e.value.failure.code, e.value.failure.kind) for e in (unknown, another)] == [
        ("certificate_refused", FailureKind.TRANSIENT)
    ] * 2


# --- addresses ---


NOT_PUBLIC = (
    "127.0.0.1", "10.1.2.3", "172.31.0.1", "192.168.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "192.0.0.8", "198.18.0.1",
    "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "203.0.113.9", "::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254",
    "ff02::1", "2001:db8::1", "3fff::1", "100::1", "::ffff:10.0.0.1", "::10.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::808:808",
    "2002:a00:1::", "2002:7f00:1::1", "2001:0:a00:1::f7f7:f7f7", "2001:0:808:808::f5ff:fffe", "fec0::1", "5f00::1",
)  # fmt: skip
PUBLIC = (
    "1.1.1.1", "172.32.0.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1",
)  # fmt: skip


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_what_is_not_the_public_internet_is_refused(address: str) -> None:
    """Loopback, private, link-local, multicast, reserved, documentation, and all of these inside mapped, NAT64, 6to4 and Teredo ones."""
    assert not may_be_called(ip_address(address), [])


@pytest.mark.parametrize("address", PUBLIC)
def test_what_is_public_is_not(address: str) -> None:
    """Also behind a translator: on a network with IPv6 alone every old address looks like that."""
    assert may_be_called(ip_address(address), [])


def test_an_allowed_network_opens_itself_only() -> None:
    """As the address stands or as it is wrapped; its neighbours stay closed."""
    networks = [ip_network("192.168.1.0/24"), ip_network("fd12::/16")]
    assert all(may_be_called(ip_address(address), networks) for address in ("192.168.1.7", "::ffff:192.168.1.7", "fd12::1"))
    assert not any(may_be_called(ip_address(address), networks) for address in ("192.168.2.7", "::ffff:192.168.2.7", "fd13::1", "::1"))
    with pytest.raises(Refused, match=r"10\.0\.0\.1"):
        permitted("x", ["10.0.0.1"], ["192.168.1.0/24"])
    with pytest.raises(Refused):
        permitted("x", [], ["0.0.0.0/0"])


# --- hooks ---


def a_script(tmp_path: Path, text: str, name: str = "hook") -> str:
    script = tmp_path / name
    script.write_text("#!/bin/sh\n" + text)
    script.chmod(stat.S_IRWXU)
    return str(script)


def a_run(*command: str, timeout_s: float = PATIENCE_S, **environment: str) -> RunHook:
    return RunHook(notice=1, command=command, environment=environment, timeout_s=timeout_s)


def test_a_hook_has_its_facts_and_nothing_of_ours(notifier: Notifier, tmp_path: Path) -> None:
    """PATH, LANG and the facts are all of its environment; its standard input is at its end; names arrive byte by byte."""
    name = b"a\nb \xff $(touch x);`touch y`.wav"
    script = a_script(tmp_path, f'/usr/bin/env -0 > "{tmp_path}/seen"; cat >> "{tmp_path}/seen"\n')
    assert isinstance(notifier.ask(a_run(script, WHISPERD_PATH=name.decode("latin-1"), WHISPERD_JOB="7")), Notified)
    seen = dict(entry.split(b"=", 1) for entry in (tmp_path / "seen").read_bytes().split(b"\0") if entry)
    by_the_shell = {b"PWD", b"_", b"OLDPWD", b"SHLVL"}
    assert {key: value for key, value in seen.items() if key not in by_the_shell} == {
        b"PATH": b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        b"LANG": b"C.UTF-8",
        b"WHISPERD_PATH": name,
        b"WHISPERD_JOB": b"7",
    }


def test_no_shell_looks_at_the_words_of_a_hook(notifier: Notifier, tmp_path: Path) -> None:
    """What a shell would run, expand or divide arrives as it is."""
    words = (f"$(touch {tmp_path}/x)", f"; touch {tmp_path}/x", "*", "a b", "`id`", "")
    script = a_script(tmp_path, f'for word in "$@"; do printf "%s\\0" "$word"; done > "{tmp_path}/words"\n')
    assert isinstance(notifier.ask(a_run(script, *words)), Notified)
    assert (tmp_path / "words").read_bytes().split(b"\0")[:-1] == [word.encode() for word in words]
    assert not (tmp_path / "x").exists()


def test_a_hook_that_fails_is_tried_again_and_its_last_line_is_told(notifier: Notifier, tmp_path: Path) -> None:
    """Escaped, and of a megabyte of output the end alone."""
    script = a_script(tmp_path, "head -c 1000000 /dev/zero | tr '\\0' x; printf '\\nlast \\033[31mwords\\n' >&2; exit 3\n")
    found = failure(notifier.ask(a_run(script)))
    assert (found.kind, found.code) == (FailureKind.TRANSIENT, "hook_failed")
    assert "ended with status 3" in found.what and r"last \x1b[31mwords" in found.what and len(found.what) < 1500


def test_a_hook_that_takes_too_long_is_ended_with_all_that_it_started(notifier: Notifier, tmp_path: Path) -> None:
    """A grandchild that ignores SIGTERM goes as well: whoever holds the other end of the pipe is gone when it is at its end."""
    os.mkfifo(tmp_path / "alive")
    listener = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    nested = f"trap '' TERM; exec 3> '{tmp_path}/alive'; echo up >&3; while :; do sleep 60 & wait; done"
    script = a_script(tmp_path, f'sh -c "{nested}" &\necho working\nwait\n')
    notifier.child.send(a_run(script, timeout_s=1.0))
    until(lambda: _read(listener) == b"up\n", "the grandchild is up")
    found = failure(notifier.hear())
    assert (found.kind, found.code) == (FailureKind.TRANSIENT, "hook_timeout") and "longer than 1 s: working" in found.what
    until(lambda: _read(listener) == b"", "nobody holds the pipe any more")
    os.close(listener)


def test_what_a_hook_leaves_behind_neither_delays_its_end_nor_lives_on(notifier: Notifier, tmp_path: Path) -> None:
    """Its work is over when it ends; a program in the background that holds its output goes with it."""
    os.mkfifo(tmp_path / "alive")
    listener = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    script = a_script(tmp_path, f"exec 3> '{tmp_path}/alive'\nsleep 60 &\necho up >&3\n")
    assert isinstance(notifier.ask(a_run(script)), Notified)
    until(lambda: _read(listener) == b"up\n", "it was up")
    until(lambda: _read(listener) == b"", "nobody holds the pipe any more")
    os.close(listener)


def _read(descriptor: int) -> bytes | None:
    """What is in the pipe; b"" when nobody holds its other end, None while it is empty."""
    try:
        return os.read(descriptor, 100)
    except BlockingIOError:
        return None


@pytest.mark.parametrize("command", [("/nonexistent/hook",), ("/etc/passwd",), ("/tmp",), ("/bin/true", "a\0b")])
def test_a_hook_that_cannot_be_run_is_final(notifier: Notifier, command: tuple[str, ...]) -> None:
    """Not there, not executable, a directory, not to be passed on."""
    found = failure(notifier.ask(a_run(*command)))
    assert (found.kind, found.code) == (FailureKind.PERMANENT, "hook_unusable")


def test_at_a_stop_what_is_in_hand_is_ended_and_named(tmp_path: Path) -> None:
    """A hook that would run for an hour does not keep the daemon: it is ended, and is no failure of its own."""
    notifier = Notifier()
    os.mkfifo(tmp_path / "alive")
    listener = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    notifier.child.send(a_run(a_script(tmp_path, f"echo up > '{tmp_path}/alive'\nexec sleep 3600\n"), timeout_s=3600.0))
    until(lambda: _read(listener) == b"up\n", "the hook is up")
    notifier.child.send(Stop())
    found = failure(notifier.hear())
    assert (found.kind, found.code) == (FailureKind.WAITING, "hook_interrupted")
    assert notifier.child.gone(0.0) == "ended normally"
    os.close(listener)


def test_a_hook_ends_with_its_notifier(tmp_path: Path) -> None:
    """A notifier that is killed cannot end it any more: it goes all the same, with what it started, though they ignore SIGTERM."""
    notifier = Notifier()
    os.mkfifo(tmp_path / "alive")
    listener = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    nested = "trap '' TERM HUP; echo up >&3; while :; do sleep 60 & wait; done"
    script = a_script(tmp_path, f"trap '' TERM HUP\nexec 3> '{tmp_path}/alive'\nsh -c \"{nested}\" &\nwait\n")
    notifier.child.send(a_run(script, timeout_s=3600.0))
    until(lambda: _read(listener) == b"up\n", "the hook and what it started are up")
    os.kill(notifier.child.pid, signal.SIGKILL)
    until(lambda: _read(listener) == b"", "nobody holds the pipe any more")
    assert notifier.child.gone(0.0).startswith("killed by SIGKILL")
    os.close(listener)


# --- what is owed: the daemon's side, with the real process ---


class Owed:
    """A real ledger with jobs that failed, and what is owed for them."""

    def __init__(self, state: Path) -> None:
        self.ledger = Ledger(str(state), epoch="e")
        self._inbox = self.ledger.register_inbox(b"/in", b"/out", 0.0)
        self._count = 0

    def owe(self, target: str, body: bytes = b"{}") -> int:
        """A notice of its own job; its number. Its delivery id is "msg_" and that."""
        self._count += 1
        name = b"%d.wav" % self._count
        with self.ledger.transaction():
            file = Sighting(path=name, dev=1, inode=self._count, size=1, mtime_ns=1, ctime_ns=1)
            job = self.ledger.see(self._inbox, file, 1.0)
            failure = Failure(kind=FailureKind.PERMANENT, code="no_audio", what="no audio")
            self.ledger.reject(job, failure, JobOptions(), 1.0)
            self.ledger.report(job, b"/out", [], 1.0, notices=[Told(target, f"msg_{self._count}", body)])
        return self._count

    def row(self, notice: int) -> dict[str, Any]:
        return dict(next(iter(self.ledger.db.query("SELECT * FROM notice WHERE id = ?", [notice]))))

    def again(self, notice: int) -> None:
        """Its pause is over."""
        with self.ledger.transaction():
            self.ledger.db.conn.execute("UPDATE notice SET not_before = 0 WHERE id = ?", [notice])


A_ROW = {
    "id": 1, "inbox_path": b"/in", "outbox": b"/out", "path": b"a.wav", "size": 1, "mtime_ns": 1, "sha256": None, "duration_s": 1.0,
    "language": "en", "quality": "good",
}  # fmt: skip


class Post:
    """The daemon's notices with their loop."""

    def __init__(self, state: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.nursery = Nursery(self.loop, on_end=lambda: None)
        self.owed = Owed(state)
        self.notices = Notices(self.nursery, self.owed.ledger, on_news=lambda: None)

    def configure(self, webhook: Any = (), hook: Any = ()) -> Settings:
        settings = Settings(inbox=({"path": "/in"},), webhook=webhook, hook=hook)  # type: ignore[arg-type]
        self.notices.apply(settings)
        return settings

    def until(self, condition: Callable[[], Any], what: str) -> None:
        async def live() -> None:
            ends_at = time.monotonic() + PATIENCE_S
            while not condition():
                assert time.monotonic() < ends_at, f"never: {what}"
                self.notices.tick(time.monotonic())
                await asyncio.sleep(0.01)

        self.loop.run_until_complete(live())

    def until_told(self, notice: int, attempts: int = 1) -> dict[str, Any]:
        """Wait for so many attempts; how the notice stands then."""
        self.until(lambda: self.owed.row(notice)["attempts"] >= attempts, f"attempt {attempts} of notice {notice}")
        return self.owed.row(notice)

    def until_sent(self, *notices: int) -> None:
        assert [self.until_told(notice)["state"] for notice in notices] == ["sent"] * len(notices)

    def end(self) -> None:
        self.notices.stop()
        self.until(lambda: not self.nursery.children, "the notifier ends")
        self.loop.close()
        self.owed.ledger.close()


@pytest.fixture
def post(tmp_path: Path) -> Iterator[Post]:
    (tmp_path / "state").mkdir()
    found = Post(tmp_path / "state")
    yield found
    found.end()


def test_what_is_owed_is_told_and_struck_off(post: Post, receiver: Receiver, tmp_path: Path) -> None:
    """A webhook gets the ledger's very body under its delivery id, a hook the facts in it."""
    script = a_script(tmp_path, f'printf "%s" "$WHISPERD_PATH" > "{tmp_path}/told"\n')
    settings = post.configure([{"url": receiver.url, "secret": SECRET, "allow": HERE}], [{"command": [script]}])
    told = bodies({**A_ROW, "path": b"\xff.wav"}, [], settings, "done", 1.0)
    post.until_sent(*[post.owed.owe(notice.target, notice.body) for notice in told])
    (call,) = receiver.calls
    assert (call[1]["webhook-id"], call[2]) == ("msg_1", told[0].body)
    assert (tmp_path / "told").read_bytes() == b"/in/\xff.wav"
    assert post.notices.idle(time.time())


def test_what_fails_is_told_again_with_growing_pauses_and_given_up_at_last(post: Post, receiver: Receiver) -> None:
    """The delivery id stays; the reason is kept; the last attempt is the one that the settings name."""
    receiver.status = 503
    settings = post.configure([{"url": receiver.url, "allow": HERE, "attempts_max": 3}])
    number = post.owed.owe(targets(settings, "done")[0])
    pauses_s = []
    for attempt in (1, 2):
        began = time.time()
        row = post.until_told(number, attempt)
        pauses_s.append(row["not_before"] - began)
        assert row["state"] == "due" and "503" in row["what"]
        post.owed.again(number)
    last = post.until_told(number, 3)
    assert pauses_s[0] >= 8 and pauses_s[1] >= 16
    assert last["state"] == "given_up" and "503" in last["what"]
    assert {headers["webhook-id"] for _, headers, _ in receiver.calls} == {"msg_1"} and len(receiver.calls) == 3


@pytest.mark.parametrize(("asked", "pause_s"), [("600", 600.0), ("2", 8.0), ("9999999", 3600.0)])
def test_a_receiver_is_not_called_before_it_asked_to_be(post: Post, receiver: Receiver, asked: str, pause_s: float) -> None:
    """The next attempt is not before it, nor before our own pause, nor later than our longest one; other notices for it wait as well."""
    receiver.status, receiver.headers = 429, {"Retry-After": asked}
    settings = post.configure([{"url": receiver.url, "allow": HERE}], [{"command": ["/bin/true"]}])
    webhook_name, hook_name = targets(settings, "done")
    began = time.time()
    row = post.until_told(post.owed.owe(webhook_name))
    assert row["state"] == "due" and pause_s <= row["not_before"] - began < pause_s + 2.0 + PATIENCE_S
    if pause_s > 60.0:
        other = post.owed.owe(webhook_name)
        post.until_sent(post.owed.owe(hook_name, bodies(A_ROW, [], settings, "done", 1.0)[0].body))
        assert post.owed.row(other)["attempts"] == 0 and len(receiver.calls) == 1


def test_what_can_never_be_told_is_given_up_at_once(post: Post, receiver: Receiver) -> None:
    """A private address without leave, and a target that the settings do not name any more; no notifier is needed for that."""
    settings = post.configure([{"url": receiver.url}])
    refused = post.until_told(post.owed.owe(targets(settings, "done")[0]))
    assert refused["state"] == "given_up" and refused["what"].startswith("cannot call 127.0.0.1")
    post.configure()
    orphan = post.until_told(post.owed.owe("hook:/gone#000"))
    assert (orphan["state"], orphan["what"]) == ("given_up", "it is not configured any more")
    post.until(lambda: not post.nursery.children, "a notifier that nobody needs ends")
    assert receiver.calls == []


def test_a_receiver_that_hangs_takes_no_more_than_its_share(post: Post, receiver: Receiver, tmp_path: Path) -> None:
    """Twenty calls that wait, and a hook that is told all the same."""
    receiver.go.clear()
    settings = post.configure([{"url": receiver.url, "allow": HERE, "timeout_s": 60}], [{"command": ["/bin/true"]}])
    webhook_name, hook_name = targets(settings, "done")
    waiting = [post.owed.owe(webhook_name) for _ in range(20)]
    body = bodies(A_ROW, [], settings, "done", 1.0)[0].body
    post.until(lambda: len(receiver.calls) == IN_FLIGHT_OF_ONE_MAX, "its share is on the way")
    post.until_sent(post.owed.owe(hook_name, body))
    assert len(receiver.calls) == IN_FLIGHT_OF_ONE_MAX
    receiver.go.set()
    post.until_sent(*waiting)


def test_a_notifier_that_dies_is_replaced_and_tells_again(post: Post, receiver: Receiver) -> None:
    """What it had in hand is told by the next one under the same id: at least once, and no attempt is counted for it."""
    receiver.go.clear()
    settings = post.configure([{"url": receiver.url, "allow": HERE}])
    number = post.owed.owe(targets(settings, "done")[0])
    post.until(lambda: len(receiver.calls) == 1, "the first call")
    (child,) = post.nursery.children.values()
    os.kill(child.pid, signal.SIGKILL)
    receiver.go.set()
    post.until_sent(number)
    assert [headers["webhook-id"] for _, headers, _ in receiver.calls] == ["msg_1", "msg_1"]


def test_a_target_that_fails_and_fails_rests_and_hides_nobody(post: Post, receiver: Receiver) -> None:
    """Of more notices than a look takes in it gets a few, then one at a time; those of others behind them are found."""
    settings = post.configure([{"url": f"http://127.0.0.1:{closed_port()}/", "allow": HERE}, {"url": receiver.url, "allow": HERE}])
    dead_name, good_name = targets(settings, "done")
    dead = [post.owed.owe(dead_name) for _ in range(LOOK_AT_MAX + 50)]
    post.until_sent(post.owed.owe(good_name))
    assert sum(post.owed.row(number)["attempts"] for number in dead) < 50


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
