"""floor: a dispatcher in the test's own process, with real watchers, outbox writers and probe, and engines that follow a script.

Owns: `Floor`, one life of a dispatcher on a directory. Its engines are real processes that do what is written in each file
(tests/tools/scripted_engine.py). The optimiser's clock goes ten times as fast as the wall's, so that a look comes every two seconds.
Conditions are waited for with a generous limit; what is waited for is said when it does not come.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from whisperd.config import Settings
from whisperd.dispatcher.dispatcher import Dispatcher
from whisperd.dispatcher.engines import Engine, Share
from whisperd.dispatcher.optimiser.values import Advice, CardPlan
from whisperd.ledger.ledger import Ledger
from whisperd.ledger.queries import Row

TOOLS = Path(__file__).parent / "tools"
PATIENCE_S = 60.0


class Pace(NamedTuple):
    """How often the loop is woken without news and the optimiser asked, and how fast the optimiser's clock goes."""

    wake_s: float
    look_s: float
    haste: float


HASTY = Pace(wake_s=0.02, look_s=0.2, haste=10.0)
TRUE = Pace(wake_s=1.0, look_s=2.0, haste=1.0)
"""As the daemon does it."""


def environment(home: Path, **engine: Any) -> dict[str, str]:
    """What the scripted engines need: where they are found, and what all of one life have in common."""
    path = os.pathsep.join([str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "SCRIPTED": json.dumps({"revision": "1", "echo": True, "log": str(home / "engines.log"), **engine})}


def plan(workers: int, *, batch: int = 4, model: str = "tiny", gpu: str = "cpu", compute_type: str = "int8") -> CardPlan:
    """So many workers on a card."""
    return CardPlan(gpu=gpu, model=model, compute_type=compute_type, batch=batch, workers=workers)


class Floor:
    """One life of a dispatcher on a directory; the next one takes up what it left."""

    def __init__(
        self,
        home: Path,
        *,
        inboxes: Sequence[dict[str, Any]] = ({},),
        engine_module: str = "scripted_engine",
        examiner_module: str = "scripted_examiner",
        pace: Pace = HASTY,
        patience_s: float = PATIENCE_S,
        **changes: Any,
    ) -> None:
        self.home = home
        self.pace = pace
        self.patience_s = patience_s
        self.inbox = home / "inbox"
        (home / "state").mkdir(exist_ok=True)
        settings: dict[str, Any] = {
            "state_dir": str(home / "state"),
            "engine": {"model": "tiny", "device": "cpu", "cpu_threads": 1, "batch": 4},
            "dispatcher": {"workers": 1},
            "watcher": {"quiet_s": 0.2},
            "inbox": [{"path": str(home / "inbox"), "outbox": str(home / "outbox"), **inbox} for inbox in inboxes],
        }
        for inbox in settings["inbox"]:
            Path(inbox["path"]).mkdir(exist_ok=True)
        for section, change in changes.items():
            settings[section] = {**settings.get(section, {}), **change} if isinstance(change, dict) else change
        self.ledger = Ledger(settings["state_dir"], epoch=uuid.uuid4().hex)
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(self._failed)
        self._errors: list[BaseException] = []
        modules = {"engine_module": engine_module, "examiner_module": examiner_module}
        self.dispatcher = Dispatcher(self.loop, self.ledger, Settings(**settings), **modules)
        self._began = time.monotonic()
        self._looked_at = self._woken_at = 0.0
        self._pinned: tuple[CardPlan, ...] | None = None
        self._follow = self.dispatcher.planning.shares
        self.dispatcher.planning.shares = self._shares  # type: ignore[method-assign]
        self.loop.call_soon(self.dispatcher.start)

    # --- what is wanted ---

    def want(self, *cards: CardPlan) -> None:
        """From now on the pool follows this plan, whatever the optimiser says."""
        self._pinned = cards
        self.dispatcher.wake()

    def _shares(self) -> list[Share]:
        planning = self.dispatcher.planning
        if self._pinned is None or planning.advice is None:
            return self._follow()
        advice, planning.advice = planning.advice, Advice(cards=self._pinned)
        try:
            return self._follow()
        finally:
            planning.advice = advice

    def drop(self, name: str, *, inbox: str = "inbox", **script: Any) -> None:
        """A recording: what the engine does with it. No two have the same content, unless `content` says so."""
        aside = self.home / inbox / f"{name}.wav.part"
        aside.write_text(json.dumps({"content": f"{inbox}/{name}", **script}))
        aside.rename(self.home / inbox / f"{name}.wav")

    def go(self, name: str) -> str:
        """The file that work with `after` waits for."""
        return str(self.home / f"go {name}")

    # --- living ---

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._errors.append(context.get("exception") or RuntimeError(context["message"]))

    def until(self, condition: Callable[[], Any], what: str, *, every_s: float = 0.02) -> Any:
        """Let the daemon live until the condition holds."""
        deadline = time.monotonic() + self.patience_s

        async def live() -> Any:
            while not (answer := condition()):
                if self._errors:  # as it would end the daemon
                    raise self._errors[0]
                assert time.monotonic() < deadline, f"not within {self.patience_s:g} s: {what}; {self.states()}"
                self._tick()
                await asyncio.sleep(every_s)
            return answer

        return self.loop.run_until_complete(live())

    def live(self, seconds: float) -> None:
        """Let the daemon live for a while, to see that something does not happen."""
        until = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= until, "time passes")

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._looked_at >= self.pace.look_s and not self.dispatcher.stopping:
            self._looked_at = now
            self.dispatcher.planning.decide(time.time() + (self.pace.haste - 1) * (now - self._began))
        if now - self._woken_at >= self.pace.wake_s:
            self._woken_at = now
            self.dispatcher.wake()

    def end(self) -> None:
        """All at once, as a SIGKILL ends a daemon: nobody says anything to the ledger any more."""
        if self.loop.is_closed():
            return
        self.loop.close()
        for child in self.dispatcher.nursery.children.values():
            child.kill(time.monotonic(), "the test ends")
            child.gone(time.monotonic())
        self.ledger.close()

    # --- looking ---

    def rows(self) -> dict[str, Row]:
        return {os.fsdecode(row["path"]).removesuffix(".wav"): row for row in self.ledger.jobs()}

    def states(self) -> dict[str, str]:
        return {name: row["state"] for name, row in self.rows().items()}

    def all_in(self, *names: str, state: str = "done") -> bool:
        states = self.states()
        return all(states.get(name) == state for name in names)

    def engines(self, model: str = "") -> list[Engine]:
        """Those that serve, the oldest first; of one model or of all."""
        serving = [engine for engine in self.dispatcher.pool.engines.values() if engine.serves]
        return sorted((engine for engine in serving if model in ("", engine.request.model)), key=lambda engine: engine.number)

    def serve(self, count: int, model: str = "") -> bool:
        """Whether exactly so many engines are there, and all of them serve."""
        there = [engine for engine in self.dispatcher.pool.engines.values() if model in ("", engine.request.model)]
        return len(there) == count == len(self.engines(model))

    def hands(self) -> list[set[int]]:
        """What each engine has in hand."""
        return [set(engine.tasks) for engine in self.dispatcher.pool.engines.values()]

    def in_hand(self) -> set[str]:
        """Names that an engine has been given."""
        sent = {job for engine in self.dispatcher.pool.engines.values() for job, task in engine.tasks.items() if task.sent}
        return {name for name, row in self.rows().items() if row["id"] in sent}

    def told(self, kind: str) -> list[dict[str, Any]]:
        """What engines of every life were told."""
        log = self.home / "engines.log"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [line for line in lines if line["kind"] == kind]

    def verbs(self, name: str) -> list[str]:
        return [event["verb"] for event in self.ledger.events(self.rows()[name]["id"])]

    def words(self, name: str) -> list[str]:
        """Texts of the segments in the published transcript."""
        return [segment["text"] for segment in json.loads((self.home / "outbox" / f"{name}.json").read_text())["segments"]]

    def loads(self) -> list[dict[str, Any]]:
        """Every engine that was asked to load a model, in order."""
        return self.told("LoadModel")

    def reasons(self) -> list[tuple[str, str]]:
        """(code, sentence) of every reason in the stored plans, in order."""
        bodies = [row[0] for row in self.ledger.db.conn.execute("SELECT body FROM plan ORDER BY id")]
        return [(reason["code"], reason["text"]) for body in bodies if body for reason in json.loads(body)["reasons"]]

    def pids(self) -> list[int]:
        return list(self.dispatcher.pool.engines)
