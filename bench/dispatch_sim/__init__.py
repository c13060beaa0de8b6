"""dispatch_sim: scenarios, oracle, baselines and goals of the optimiser (OPTIMISER.md §4 and §6). `python -m bench.dispatch_sim --help`."""
