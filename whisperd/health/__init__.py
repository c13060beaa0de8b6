"""health: observe, judge, call a heal it was handed.

Owns: the one list of periodic jobs (APScheduler), the checks. May not import sibling rooms, call NVML or kill processes.
"""
