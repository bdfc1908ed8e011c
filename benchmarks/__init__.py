"""Where README's figures come from; `python benchmarks/run_all.py [name]` runs them."""
