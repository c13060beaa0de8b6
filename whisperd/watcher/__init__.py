"""watcher: what lies in one inbox, told to the daemon as settled sightings. One process for each inbox.

Owns: the incoming share and the only use of watchdog. It lists, stats, opens and tests for writers; it never writes or moves there,
never trusts an event without a look, and reads the ledger only. What it finds travels over the wire; so do open descriptors.
"""
