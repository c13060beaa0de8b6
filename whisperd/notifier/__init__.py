"""notifier: tells others of finished files: signed calls of webhooks, and commands.

Owns: the network connections that whisperd opens while it runs, and the programs of others that it runs. One process for all of it,
started by the daemon and imported by nobody.
"""
