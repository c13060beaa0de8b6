"""known: what the ledger says of every path of one inbox, small enough for a million (pure).

Owns: one row for each path, as columns of numbers: a 64-bit digest of the path (keyed anew in every process, so nobody can aim at a
collision), the identity of the file, the state of its newest job. A batch of entries is held against all rows at once; only what differs
comes back one by one. 58 bytes for each path; the paths themselves stay in the ledger, but for some of those whose source is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from whisperd.vocabulary import Sighting, State
from whisperd.watcher.source import Entry

KnownRow = tuple[bytes, int, int, int, int, int, str]
"""path, dev, inode, size, mtime_ns, ctime_ns, state: as the ledger's queries tell it."""

STATES = tuple(State)
CODE = {str(state): number for number, state in enumerate(STATES)}
SOURCE_NEEDED = (State.SEEN, State.READY, State.RUNNING)
FINISHED = (State.TRANSCRIBED, State.DONE, State.FAILED, State.CANCELLED)
NUMBERS = ("digest", "parent", "dev", "inode", "size", "mtime_ns", "ctime_ns")
CHUNK = 20_000
PATHS_MAX = 50_000  # at hand without a look into the ledger
ABSENT_MAX = 200_000  # told of one walk

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Known(NamedTuple):
    """What the ledger says of the newest job of a path."""

    dev: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    state: str

    def describes(self, sighting: Sighting) -> bool:
        """Whether this is about the content that was sighted. A job whose source had gone describes nothing."""
        return self.state != State.GONE and (self.size, self.mtime_ns) == (sighting.size, sighting.mtime_ns)


class Held(NamedTuple):
    """One entry that is not simply as the ledger has it. `twin`: some path whose source is needed has its inode."""

    sighting: Sighting
    known: Known | None
    twin: bool


class KnownPaths:
    """The newest job of every path, and which of them the walk under way has met."""

    def __init__(self, rows: Iterable[KnownRow] = ()) -> None:
        self._paths: dict[int, bytes] = {}
        self._columns = self._table(rows)
        self._present: Bools = np.ones(len(self), bool)
        self._vouched: set[int] = set()
        self._needed_inodes: Ints | None = None

    def __len__(self) -> int:
        return len(self._columns["digest"])

    # --- what the ledger says ---

    def update(self, rows: Iterable[KnownRow]) -> None:
        """Take over what moved since. A path that is new counts as met: it cannot be missed by a walk that began without it."""
        fresh = self._table(rows)
        if not len(fresh["digest"]):
            return
        at, found = self._find(fresh["digest"])
        for name, column in self._columns.items():
            column[at[found]] = fresh[name][found]
        if not found.all():
            joined = {name: np.concatenate([column, fresh[name][~found]]) for name, column in self._columns.items()}
            order = np.argsort(joined["digest"], kind="stable")
            self._columns = {name: column[order] for name, column in joined.items()}
            self._present = np.concatenate([self._present, np.ones(np.count_nonzero(~found), bool)])[order]
        self._needed_inodes = None

    def forget(self, paths: Sequence[bytes]) -> None:
        """These paths are no longer what their rows say."""
        at, found = self._find(_digests(paths))
        if found.any():
            self._columns = {name: np.delete(column, at[found]) for name, column in self._columns.items()}
            self._present = np.delete(self._present, at[found])
            self._needed_inodes = None

    def lookup(self, paths: Sequence[bytes]) -> list[Known | None]:
        """What is known of these paths."""
        at, found = self._find(_digests(paths))
        return [self._row(int(row)) if there else None for row, there in zip(at, found, strict=True)]

    def needed_devices(self) -> set[int]:
        """The devices on which files lay that are still needed."""
        return {int(dev) for dev in np.unique(self._columns["dev"][self._in(SOURCE_NEEDED)])}

    # --- one walk ---

    def begin(self) -> None:
        """A walk begins: nothing was met yet."""
        self._present[:] = False
        self._vouched = set()

    def hold(self, entries: Sequence[Entry], dev: int, *, steady_inodes: bool) -> Iterator[Held]:
        """Hold a batch of entries on device `dev` against the ledger: what is new, changed, still to settle, or doubtful comes back."""
        if not entries:
            return
        paths, inodes, sizes, mtimes, ctimes = zip(*entries, strict=True)
        at, found = self._find(_digests(paths))
        if len(self):
            rest = found & self._same(at, {"size": sizes, "mtime_ns": mtimes}) & ~self._in((State.GONE,), at)
            self._present[at[found]] = True
            self._vouched.update(int(one) for one in np.unique(self._columns["dev"][at[rest]]))
            identity = {"ctime_ns": ctimes, "inode": inodes} if steady_inodes else {"ctime_ns": ctimes}
            doubtful = self._in(FINISHED, at) & ~self._same(at, identity) & (self._columns["dev"][at] == dev)
            rest &= ~self._in((State.SEEN,), at) & ~doubtful
        else:
            rest = found
        odd = np.flatnonzero(~rest)
        twins = self._have_twins(np.array([inodes[number] for number in odd], np.int64))
        for number, twin in zip(odd.tolist(), twins.tolist(), strict=True):
            path, inode, size, mtime_ns, ctime_ns = entries[number]
            sighting = Sighting(path=path, dev=dev, inode=inode, size=size, mtime_ns=mtime_ns, ctime_ns=ctime_ns)
            yield Held(sighting, self._row(int(at[number])) if found[number] else None, twin)

    def devices(self, dev: int) -> set[int]:
        """Numbers under which this very inbox was scanned: they change with a remount; a file that is still here vouches for them."""
        return self._vouched | {dev}

    def absent(
        self, devices: set[int], unlisted: Iterable[bytes], read_again: Callable[[], Iterable[KnownRow]]
    ) -> list[tuple[bytes, Known]]:
        """Paths whose source is needed, on one of these devices, that the walk did not meet where it looked.

        `unlisted` are the directories that it did not list; `read_again` is asked for all rows when a path is not at hand.
        """
        missing = np.flatnonzero(self._in(SOURCE_NEEDED) & ~self._present)
        missing = missing[np.isin(self._columns["dev"][missing], np.array(sorted(devices), np.int64))]
        if len(missing):
            missing = missing[~np.isin(self._columns["parent"][missing], _digests(list(unlisted)))]
        rows = {int(self._columns["digest"][row]): self._row(int(row)) for row in missing[:ABSENT_MAX]}
        if rows.keys() - self._paths.keys():
            self._paths |= {digest: row[0] for row in read_again() if (digest := hash(row[0])) in rows}
        return [(self._paths[digest], known) for digest, known in rows.items() if digest in self._paths]

    # --- columns ---

    def _table(self, rows: Iterable[KnownRow]) -> dict[str, NDArray[Any]]:
        """Sorted by digest; of rows with the same path the last one."""
        remaining = iter(rows)
        parts: dict[str, list[NDArray[Any]]] = {name: [np.empty(0, np.int64)] for name in NUMBERS} | {"state": [np.empty(0, np.uint8)]}
        while chunk := list(islice(remaining, CHUNK)):
            paths, *numbers, states = zip(*chunk, strict=True)
            parents = [path.rpartition(b"/")[0] for path in paths]
            for name, column in zip(NUMBERS, (_digests(paths), _digests(parents), *numbers), strict=True):
                parts[name].append(np.asarray(column, np.int64))
            parts["state"].append(np.array([CODE[state] for state in states], np.uint8))
            self._note_paths(paths, states)
        return _sorted_once({name: np.concatenate(parts.pop(name)) for name in (*NUMBERS, "state")})

    def _note_paths(self, paths: Iterable[bytes], states: Iterable[str]) -> None:
        for path, state in zip(paths, states, strict=True):
            if state not in SOURCE_NEEDED:
                self._paths.pop(hash(path), None)
            elif len(self._paths) < PATHS_MAX:
                self._paths[hash(path)] = path

    def _find(self, digests: Ints) -> tuple[Ints, Bools]:
        """For each digest a row, and whether it is its row."""
        column = self._columns["digest"]
        if not len(column):
            return np.zeros(len(digests), np.int64), np.zeros(len(digests), bool)
        at = np.minimum(np.searchsorted(column, digests), len(column) - 1)
        return at, column[at] == digests

    def _same(self, at: Ints, values: dict[str, tuple[int, ...]]) -> Bools:
        same = np.ones(len(at), bool)
        for name, wanted in values.items():
            same &= self._columns[name][at] == np.array(wanted, np.int64)
        return same

    def _in(self, states: Iterable[State], at: Ints | slice = slice(None)) -> Bools:
        """Of the rows `at`, which are in one of these states."""
        chosen = np.zeros(len(STATES), bool)
        chosen[[CODE[state] for state in states]] = True
        return np.asarray(chosen[self._columns["state"][at]])

    def _have_twins(self, inodes: Ints) -> Bools:
        if self._needed_inodes is None:
            self._needed_inodes = np.sort(self._columns["inode"][self._in(SOURCE_NEEDED)])
        known = self._needed_inodes
        if not len(known):
            return np.zeros(len(inodes), bool)
        return np.asarray(known[np.minimum(np.searchsorted(known, inodes), len(known) - 1)] == inodes)

    def _row(self, row: int) -> Known:
        dev, inode, size, mtime_ns, ctime_ns = (int(self._columns[name][row]) for name in NUMBERS[2:])
        return Known(dev, inode, size, mtime_ns, ctime_ns, STATES[self._columns["state"][row]])


def _digests(paths: Sequence[bytes]) -> Ints:
    return np.fromiter(map(hash, paths), np.int64, len(paths))


def _sorted_once(columns: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    order = np.argsort(columns["digest"], kind="stable")
    ordered = columns["digest"][order]
    last = np.ones(len(order), bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    kept = order[last]
    return {name: columns.pop(name)[kept] for name in (*NUMBERS, "state")}
