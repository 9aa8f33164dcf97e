"""How fast it is. Each program runs as `python benchmarks/NAME.py` and as `quire bench NAME`."""
