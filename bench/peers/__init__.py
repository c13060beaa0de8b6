"""peers: each contender as a script of its own, run in its own process: MODEL THREADS FILE…; its last line is a JSON object.

{"texts": [one a file], "load_cpu_s": …, "load_wall_s": …, "run_cpu_s": …, "run_wall_s": …, "about": …}: `load` is from the start of
the interpreter until the model is loaded, `run` is all the rest.
"""
