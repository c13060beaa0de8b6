"""dispatcher: the right children on the right jobs.

Owns: watcher, outbox, engine and probe processes, the plan, who is next, what a failure means for the next attempt. May not import
the engine or a CUDA library, nor touch an inbox or an outbox. NVML is imported in the probe process only.
"""
