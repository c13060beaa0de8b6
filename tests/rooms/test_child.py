"""The life of real child processes: what each event does in each state, last words, exits as sentences, and who dies with whom."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from whisperd.child import LAST_LINES, Child, ChildMove, Life, blames_the_work, describe_exit
from whisperd.vocabulary import JobOptions
from whisperd.wire import Abandon, EngineOut, EngineReady, Stop, Transcribe

PATIENCE_S = 60.0  # for a process to start or end on a busy machine; never waited out when all is well

PUPPET = '''
"""A child that speaks the engine's wire and does what PUPPET says."""

import json, os, signal, subprocess, sys, time
from whisperd.wire import Abandoned, Channel, EngineIn, EngineReady, Stop, WireClosed, join_daemon

def ready(channel, told=""):
    channel.send_all(EngineReady(
        model=told, revision="", device="none", compute_type="none", encoder="none", slots=1, load_s=0.0, rss_mib=0
    ))

def main():
    role = os.environ["PUPPET"]
    channel = join_daemon(EngineIn)
    sys.stderr.write(f"DEBUG puppet {role} begins\\n")
    if role == "tells":
        grandchild = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, close_fds=False)
        told = {
            "group": os.getpgid(0) == os.getpid(),
            "stdin": os.readlink("/proc/self/fd/0"),
            "stdout": os.readlink("/proc/self/fd/1"),
            "oom": open("/proc/self/oom_score_adj").read().strip(),
            "sigint_ignored": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
            "grandchild_has_the_wire": "socket:" in grandchild.stdout,
        }
        print("this must not reach the wire")
        os.system("echo nor this")
        ready(channel, json.dumps(told))
    elif role == "parent":
        grandchild = subprocess.Popen(["sleep", "600"])
        ready(channel, str(grandchild.pid))
    elif role == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ready(channel)
        while True:
            time.sleep(600)
    elif role == "parent that ends":
        grandchild = subprocess.Popen(["sleep", "600"])
        ready(channel, str(grandchild.pid))
        return
    else:
        ready(channel)
    while True:
        for frame in channel.wait(None):
            for descriptor in frame.descriptors:
                sys.stderr.write(os.read(descriptor, 100).decode() + "\\n")
                os.close(descriptor)
            if isinstance(frame.message, Stop):
                return
            channel.send_all(Abandoned(job=frame.message.job))

try:
    main()
except WireClosed:
    sys.exit(7)
'''

BARE = '''
"""A child without a wire: runs the Python in BARE."""

import os, resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
exec(os.environ["BARE"])
'''


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory for PYTHONPATH that holds the children of these tests."""
    home = tmp_path_factory.mktemp("modules")
    (home / "puppet.py").write_text(PUPPET)
    (home / "bare.py").write_text(BARE)
    return str(home)


def open_files() -> set[tuple[str, str]]:
    """Every open descriptor and what it is open on (garbage of earlier tests may go meanwhile: only what is new can be a leak)."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor that lists them
            found.add((descriptor, os.readlink(f"/proc/self/fd/{descriptor}")))
    return found


Spawn = Callable[..., Child[Any]]


@pytest.fixture
def spawn(modules: str) -> Iterator[Spawn]:
    """Start children; what is left of them at the end is killed, and no descriptor may be left of those that are gone."""
    before = open_files()
    children: list[Child[Any]] = []
    search = os.pathsep.join([modules, *filter(None, [os.environ.get("PYTHONPATH")])])

    def start(module: str, **settings: str) -> Child[Any]:
        child: Child[Any] = Child(name=module, module=module, receives=EngineOut, now=0.0, env={"PYTHONPATH": search, **settings})
        children.append(child)
        return child

    yield start
    for child in children:
        if child.life is not Life.GONE:
            child.kill(99.0, "the test is over")
            wait_for_exit(child)
            child.gone(99.0)
    assert not open_files() - before, "a descriptor leaked"


def wait_for_exit(child: Child[Any]) -> None:
    readable, _, _ = select.select([child.pidfd], [], [], PATIENCE_S)
    assert readable, f"{child.name} did not end"


def bury(child: Child[Any], now: float = 9.0) -> str:
    wait_for_exit(child)
    return child.gone(now)


def hear(child: Child[Any]) -> Any:
    frames = child.channel.wait(PATIENCE_S)
    assert frames, f"{child.name} said nothing"
    return frames[0].message


def read_until_ended(child: Child[Any]) -> list[str]:
    lines: list[str] = []
    while not child.stderr_ended:
        select.select([child.stderr_fileno()], [], [], PATIENCE_S)
        lines += child.read_stderr()
    return lines


def is_alive(pid: int) -> bool:
    """Whether a process still runs (a zombie does not)."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


def wait_until_dead(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.005)


# --- the life --------------------------------------------------------------------------------------------------------------------


def test_a_whole_life(spawn: Spawn) -> None:
    """booting → idle → busy → idle → busy → draining → gone, with a real process that answers, gets a descriptor and ends as asked."""
    child = spawn("puppet", PUPPET="obedient")
    assert (child.life, child.since, child.born_at) == (Life.BOOTING, 0.0, 0.0)
    assert isinstance(hear(child), EngineReady)
    child.ready(1.0)
    assert (child.life, child.since) == (Life.IDLE, 1.0)
    child.assign(2.0)
    source, told = os.pipe()
    os.write(told, b"INFO the content of the source")
    os.close(told)
    child.send(Transcribe(job=4, options=JobOptions()), (source,))
    assert hear(child).job == 4
    child.release(3.0)
    assert (child.life, child.since) == (Life.IDLE, 3.0)
    child.assign(4.0)
    child.drain(5.0)
    child.release(6.0)
    assert (child.life, child.since) == (Life.DRAINING, 5.0)
    assert bury(child, 7.0) == "ended normally"
    assert (child.life, child.since, child.killed_by_us) == (Life.GONE, 7.0, "")
    assert "INFO the content of the source" in child.last_lines


REFUSED = "refused"
EVENTS = ("ready", "assign", "release", "drain", "terminate", "kill")
CELLS: dict[Life, tuple[Any, ...]] = {
    #               ready          assign     release        drain          terminate     kill
    Life.BOOTING: (Life.IDLE, REFUSED, REFUSED, Life.DRAINING, Life.KILLING, Life.KILLING),
    Life.IDLE: (REFUSED, Life.BUSY, REFUSED, Life.DRAINING, Life.KILLING, Life.KILLING),
    Life.BUSY: (REFUSED, REFUSED, Life.IDLE, Life.DRAINING, Life.KILLING, Life.KILLING),
    Life.DRAINING: (Life.DRAINING, REFUSED, Life.DRAINING, Life.DRAINING, Life.KILLING, Life.KILLING),
    Life.KILLING: (Life.KILLING, REFUSED, Life.KILLING, Life.KILLING, Life.KILLING, Life.KILLING),
    Life.GONE: (REFUSED, REFUSED, REFUSED, Life.GONE, Life.GONE, Life.GONE),
}


@pytest.fixture(scope="module")
def sleeper() -> Iterator[Child[Any]]:
    child: Child[Any] = Child(name="sleeper", module="this", receives=EngineOut, now=0.0)
    wait_for_exit(child)
    child.read_stderr()
    yield child
    child.life = Life.BUSY
    child.gone(0.0)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("life", Life)
def test_every_event_in_every_state(sleeper: Child[Any], life: Life, event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cell of state × event is as written: the next state, or `child_move`. What is not foreseen is refused, and moves nothing."""
    told: list[object] = []
    monkeypatch.setattr(os, "killpg", lambda group, number: told.append((group, number)))
    monkeypatch.setattr(sleeper, "send", told.append)
    sleeper.life, sleeper.since, sleeper.killed_by_us = life, 1.0, ""
    arguments = (2.0, "why") if event in ("terminate", "kill") else (2.0,)
    expected = CELLS[life][EVENTS.index(event)]
    if expected is REFUSED:
        with pytest.raises(ChildMove, match=f"sleeper: it is {life}"):
            getattr(sleeper, event)(*arguments)
        assert (sleeper.life, sleeper.since, told) == (life, 1.0, [])
        return
    getattr(sleeper, event)(*arguments)
    assert sleeper.life is expected
    assert sleeper.since == (1.0 if expected is life else 2.0)
    signals = {"terminate": signal.SIGTERM, "kill": signal.SIGKILL}
    if event in signals and life is not Life.GONE:
        assert told == [(sleeper.pid, signals[event])]
    else:
        assert told == ([Stop()] if event == "drain" and expected is not life else [])


def test_a_child_drained_while_booting(spawn: Spawn) -> None:
    """Asked to stop before it said that it is ready, a child ends by itself and is never taken for idle."""
    child = spawn("puppet", PUPPET="obedient")
    child.drain(1.0)
    assert isinstance(hear(child), EngineReady)
    child.ready(2.0)
    assert child.life is Life.DRAINING
    assert bury(child) == "ended normally"


def test_burying_twice_is_refused(spawn: Spawn) -> None:
    """A second `gone` is refused: its descriptors may be somebody else's by now."""
    child = spawn("bare", BARE="pass")
    assert bury(child) == "ended normally"
    with pytest.raises(ChildMove):
        child.gone(2.0)


def test_boot_failure_says_why(spawn: Spawn) -> None:
    """A child that cannot even start leaves its reason in its last lines; what is sent to it meanwhile is no error."""
    child = spawn("no_such_module_of_ours")
    wait_for_exit(child)
    child.send(Abandon(job=1), (os.open("/dev/null", os.O_RDONLY),))
    assert bury(child) == "ended with status 1"
    assert "No module named" in child.last_lines[-1]


def test_a_process_that_cannot_be_started_leaves_nothing(spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    """When no process can be made at all, the error is the system's own and no descriptor is lost (`spawn` counts them)."""
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(FileNotFoundError):
        spawn("puppet")


def test_what_a_child_is_given(spawn: Spawn) -> None:
    """A child leads its own group, is the first to go when memory runs out, ignores Ctrl-C, and nothing it prints or starts can reach
    the wire."""
    child = spawn("puppet", PUPPET="tells")
    told = json.loads(hear(child).model)
    assert told == {
        "group": True,
        "stdin": "/dev/null",
        "stdout": "/dev/null",
        "oom": "500",
        "sigint_ignored": True,
        "grandchild_has_the_wire": False,
    }
    child.drain(1.0)
    assert bury(child) == "ended normally"


def test_a_child_ends_when_its_wire_closes(spawn: Spawn) -> None:
    """A child whose wire is closed on it learns so as `WireClosed`."""
    child = spawn("puppet", PUPPET="obedient")
    hear(child)
    child.channel.close()
    assert bury(child) == "ended with status 7"


# --- killing ---------------------------------------------------------------------------------------------------------------------


def test_killing_takes_the_whole_group(spawn: Spawn) -> None:
    """SIGKILL reaches what the child started, too; the obituary says that it was us, and why."""
    child = spawn("puppet", PUPPET="parent")
    grandchild = int(hear(child).model)
    child.ready(1.0)
    assert is_alive(grandchild)
    child.kill(2.0, "no progress for 600 s")
    assert child.life is Life.KILLING
    assert bury(child) == "killed by SIGKILL (Killed)"
    assert child.killed_by_us == "no progress for 600 s"
    wait_until_dead(grandchild)


def test_what_a_child_leaves_behind_dies_with_it(spawn: Spawn) -> None:
    """A child that ends by itself does not leave a grandchild behind in its group."""
    child = spawn("puppet", PUPPET="parent that ends")
    grandchild = int(hear(child).model)
    assert bury(child) == "ended normally"
    wait_until_dead(grandchild)


def test_terminate_then_kill(spawn: Spawn) -> None:
    """A child that ignores SIGTERM is killed; the first reason is the one that is told."""
    child = spawn("puppet", PUPPET="stubborn")
    hear(child)
    child.drain(1.0)
    child.terminate(2.0, "it did not stop in time")
    assert select.select([child.pidfd], [], [], 0.1)[0] == []
    child.kill(3.0, "it did not even terminate")
    assert bury(child) == "killed by SIGKILL (Killed)"
    assert (child.killed_by_us, child.since) == ("it did not stop in time", 9.0)


def test_terminate_is_enough_for_most(spawn: Spawn) -> None:
    """SIGTERM ends an ordinary child."""
    child = spawn("puppet", PUPPET="obedient")
    hear(child)
    child.terminate(1.0, "shutdown")
    assert bury(child) == "killed by SIGTERM (Terminated)"


def test_killing_a_child_that_has_just_ended(spawn: Spawn) -> None:
    """Between its end and its burial a child may still be killed: nothing happens."""
    child = spawn("bare", BARE="pass")
    wait_for_exit(child)
    child.kill(1.0, "too late")
    assert bury(child) == "ended normally"
    child.kill(2.0, "much too late")
    assert child.life is Life.GONE


DAEMON = """
import sys, time
from whisperd.child import Child
from whisperd.wire import EngineOut

child = Child(name="orphan", module="puppet", receives=EngineOut, now=0.0)
assert child.channel.wait(60)
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("role", ["obedient", "stubborn"])
def test_a_child_dies_with_its_daemon(modules: str, role: str) -> None:
    """When the daemon is killed with SIGKILL its children die at once, also one that never looks at its wire and ignores SIGTERM."""
    search = os.pathsep.join([modules, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": search, "PUPPET": role}
    with subprocess.Popen([sys.executable, "-c", DAEMON], stdout=subprocess.PIPE, text=True, env=env) as daemon:
        assert daemon.stdout is not None
        orphan = int(daemon.stdout.readline())
        assert is_alive(orphan)
        daemon.kill()
        daemon.wait(PATIENCE_S)
        wait_until_dead(orphan)


# --- last words ------------------------------------------------------------------------------------------------------------------


def test_lines_are_escaped_cut_and_kept(spawn: Spawn) -> None:
    """What a child writes to standard error comes as single, harmless lines; blank ones are left out, and the last 20 are kept."""
    script = r"""
import sys
raw = sys.stderr.buffer
raw.write(b"INFO plain\n\n   \n")
raw.write(b"esc \x1b[31mred\x1b[0m bell \x07 byte \xff rtl \xe2\x80\xae\n")
raw.write(b"x" * 5000 + b"\n")
for number in range(40):
    raw.write(b"line %d\n" % number)
raw.write(b"no end")
raw.flush()
"""
    child = spawn("bare", BARE=script)
    lines = read_until_ended(child)
    assert lines[:2] == ["INFO plain", r"esc \x1b[31mred\x1b[0m bell \x07 byte \xff rtl \u202e"]
    assert lines[2] == "x" * 1000
    assert lines[3:] == [*(f"line {number}" for number in range(40)), "no end"]
    assert list(child.last_lines) == lines[-LAST_LINES:]
    assert bury(child) == "ended normally"
    assert list(child.last_lines) == lines[-LAST_LINES:]


def test_last_words_are_heard_at_the_burial(spawn: Spawn) -> None:
    """What nobody has read yet when a child dies is read when it is buried."""
    child = spawn("bare", BARE="import os; os.write(2, b'terminate called\\n'); os.abort()")
    assert bury(child) == "killed by SIGABRT (Aborted)"
    assert list(child.last_lines) == ["terminate called"]


def test_silence_is_not_the_end(spawn: Spawn) -> None:
    """An empty answer means nothing now; `stderr_ended` means never again. Blank lines are neither a line nor the end."""
    child = spawn("bare", BARE=r"import os, sys; os.write(2, b'\n\n'); sys.stdin.buffer.raw.read(1); os.write(2, b'last\n')")
    assert select.select([child.stderr_fileno()], [], [], PATIENCE_S)[0]
    assert (child.read_stderr(), child.stderr_ended) == ([], False)
    assert (child.read_stderr(), child.stderr_ended) == ([], False)
    child.send(Stop())
    assert read_until_ended(child) == ["last"]
    assert child.stderr_ended
    bury(child)


def test_a_child_that_never_stops_writing_holds_nobody_up(spawn: Spawn) -> None:
    """`read_stderr` takes one pipe full and comes back, though the child fills the pipe faster than anybody can read it."""
    child = spawn("bare", BARE="import os\nwhile True: os.write(2, b'x' * 4095 + b'\\n')")
    for _ in range(5):
        select.select([child.stderr_fileno()], [], [], PATIENCE_S)
        lines = child.read_stderr()
        assert 0 < len(lines) < 100
    child.kill(1.0, "enough")
    assert bury(child) == "killed by SIGKILL (Killed)"


# --- exits -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("pass", "ended normally"),
        ("raise SystemExit(3)", "ended with status 3"),
        ("raise SystemExit(139)", "ended with status 139"),
        ("raise ValueError", "ended with status 1"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV (Segmentation fault)"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL (Killed)"),
        ("import os; os.kill(os.getpid(), 31)", "killed by SIGSYS (Bad system call)"),
        ("import os; os.kill(os.getpid(), 40)", "killed by signal 40"),
    ],
)
def test_real_exits_as_sentences(spawn: Spawn, script: str, sentence: str) -> None:
    """How a real process ended is said in a sentence."""
    assert bury(spawn("bare", BARE=script)) == sentence


def test_every_signal_has_a_sentence() -> None:
    """All 64 signals and all exit statuses can be told: by name and meaning where there is one, by number otherwise."""
    for number in range(1, 65):
        sentence = describe_exit(-number)
        if number in set(signal.Signals):
            assert sentence == f"killed by {signal.Signals(number).name} ({signal.strsignal(number)})"
            assert "None" not in sentence
        else:
            assert sentence == f"killed by signal {number}"
    assert {describe_exit(status) for status in range(1, 256)} == {f"ended with status {status}" for status in range(1, 256)}


FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.mark.parametrize(
    ("returncode", "memory_ran_out", "killed_by_us", "blamed"),
    [
        *((-number, False, False, number not in FROM_OUTSIDE) for number in range(1, 65)),
        *((-number, True, False, True) for number in FROM_OUTSIDE),
        *((-number, False, True, True) for number in FROM_OUTSIDE),
        (-signal.SIGKILL, True, True, True),
        (0, False, False, True),
        (1, False, False, True),
        (9, False, False, True),
        (15, False, False, True),
        (137, False, False, True),
    ],
)
def test_who_is_to_blame(returncode: int, memory_ran_out: bool, killed_by_us: bool, blamed: bool) -> None:
    """A crash, a kill for lack of memory or of progress counts as an attempt of the file; a signal from somebody's hand does not."""
    assert blames_the_work(returncode, memory_ran_out=memory_ran_out, killed_by_us=killed_by_us) is blamed
