"""outbox: the transcript on the share, whole or not at all. A process of its own for each outbox (`python -m whisperd.outbox`)."""
