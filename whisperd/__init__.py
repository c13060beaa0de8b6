"""whisperd: drop a recording into a folder, find its transcript in the outbox next to it."""

__version__ = "0.1.0"
