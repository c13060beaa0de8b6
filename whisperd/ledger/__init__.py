"""ledger: every file and everything that happened to it, in one SQLite file.

Owns: the rows, the legal moves, the leases, the history. May not: decide policy, read a clock (`now` is passed in), know what a
path means. Fails with `IllegalMove` when a verb does not fit the state a job is in, and with `StateDirError` when the file cannot be used.
"""
