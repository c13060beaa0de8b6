"""ledger: the verbs. Each arrow of the state diagram is one method, one guarded UPDATE, one event row written by a trigger.

The verbs stand by subject: `intake` (inbox to queue), `work` (queue to transcript), `delivery` (outbox and after), `desk` (the operator),
`observations`, `upkeep`; all of them write through `store`. Fails with `NoSuchJob`, `IllegalMove` (the job is not where the verb begins),
`LeaseLost` (the job runs for somebody else now), `LedgerStuck` (the disk is full or failing). A verb that failed has changed nothing, also
inside a longer transaction.
"""

from __future__ import annotations

from whisperd.ledger.delivery import DeliveryVerbs
from whisperd.ledger.desk import DeskVerbs
from whisperd.ledger.intake import IntakeVerbs, Settling
from whisperd.ledger.observations import Observations
from whisperd.ledger.store import IllegalMove, LeaseLost, NoSuchJob
from whisperd.ledger.upkeep import Upkeep
from whisperd.ledger.work import WorkVerbs

__all__ = ["IllegalMove", "LeaseLost", "Ledger", "NoSuchJob", "Settling"]


class Ledger(IntakeVerbs, WorkVerbs, DeliveryVerbs, DeskVerbs, Observations, Upkeep):
    """Read and write access. One per process that writes."""
