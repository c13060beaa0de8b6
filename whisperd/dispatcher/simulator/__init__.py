"""simulator: a whole installation on paper: recordings, engines, cards, heat, other programs; decided by any policy, in seconds.

Discrete events, rates constant between them; the physics are those of OPTIMISER.md §4 with the product's engines in it (batches, windows,
drains at a boundary). `world.simulate(scenario, policy, seed)` is everything there is to call. No clock, no input or output, no chance
but seeded.
"""
