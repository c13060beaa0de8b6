"""report: show. Read-only views of the ledger; writes nothing."""
