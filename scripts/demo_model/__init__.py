"""The demo model: scripts that synthesise speech, train a small Whisper on it, export it and measure it.

Run them from the root of the repository, e.g. ``python -m scripts.demo_model.evaluate``; README.md tells the order.
Nothing here is imported by the daemon.
"""
