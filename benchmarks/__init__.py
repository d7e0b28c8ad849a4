"""How fast, how large and how right, beside peers and limits measured in the same run."""
