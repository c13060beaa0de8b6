"""bench: what whisperd costs, measured against its bars and its peers; each module runs as `python -m bench.NAME`."""
