"""Power cuts: the shutdown ioctl on loop-mounted ext4 and xfs in the middle of the corridor. No acknowledged transcript is ever lost.

cutter.py makes the cuts and judges what is found after each; disks.py is the mounting and the cutting.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from disks import missing

CUTS = int(os.environ.get("WHISPERD_TEST_CUTS", "300"))
CUTS_MIN = 200
CARELESS_CUTS = 320  # at most: it ends with the first that is found out
SEED = int(os.environ.get("WHISPERD_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 31)
HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(missing() != "", reason=f"power cannot be cut here: {missing()}")


def cut(scratch: Path, cuts: int, careless: str = "") -> Generator[dict[str, Any], None, None]:
    """What was found after each of so many cuts. Closed early, it ends with the cut under way."""
    command = [sys.executable, str(HERE / "cutter.py"), str(scratch), str(SEED), str(cuts), careless]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as cutter:
        assert cutter.stdout is not None and cutter.stderr is not None
        for number, line in enumerate(cutter.stdout):
            if number % 40 == 0:
                print(f"cut {number}/{cuts}", flush=True)
            yield json.loads(line)
        said = cutter.stderr.read()
    assert cutter.returncode == 0, said


@pytest.mark.timeout(300)
def test_no_cut_of_the_power_loses_or_tears_what_was_acknowledged(memory: Path) -> None:
    """Ledger and outbox on ext4 and xfs, together and apart, power cut at random moments and after random calls, with and without the
    journal's last words: every transcript that the ledger had as published is whole, what else shows is whole, the ledger's check says ok
    and its history is legal; the next life of the daemon finishes and publishes every file once and leaves nothing over."""
    print(f"WHISPERD_TEST_SEED={SEED}")
    assert shutil.which("strace"), "strace is not installed: ./scripts/debian-packages strace"
    cuts = list(cut(memory, CUTS))
    wrong = [f"{found['where']}\n    {fact}" for found in cuts for fact in found["wrong"]]
    print(f"{len(cuts)} cuts; acknowledged before the cut: {sorted(Counter(found['acknowledged'] for found in cuts).items())}")
    print(f"files that showed without being acknowledged: {sum(found['showed'] - 3 * found['acknowledged'] for found in cuts)}, all whole")
    assert not wrong, f"seed {SEED}: {len(wrong)} faults after {len(cuts)} cuts:\n" + "\n".join(wrong[:40])
    assert len(cuts) >= CUTS_MIN
    assert sum(found["acknowledged"] > 0 for found in cuts) >= len(cuts) // 10, "too few cuts after an acknowledgement to prove anything"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("careless", ["files", "folders"])
def test_a_corridor_that_forgets_fsync_is_found_out(memory: Path, careless: str) -> None:
    """The cuts would notice: without fsync of files, or of folders alone, acknowledged transcripts are lost or torn."""
    with closing(cut(memory, CARELESS_CUTS, careless)) as cuts:
        found_out = any(fact.startswith(("acknowledged", "torn")) for found in cuts for fact in found["wrong"])
    assert found_out, f"seed {SEED}: nothing was found in {CARELESS_CUTS} cuts"
