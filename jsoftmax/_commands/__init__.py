"""`python -m jsoftmax verify` and `bench`. Imports public modules alone; only `__main__` imports it."""
