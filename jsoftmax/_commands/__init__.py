"""`python -m jsoftmax verify` and `bench`. Imports the public names alone; nothing imports it but `__main__`."""
