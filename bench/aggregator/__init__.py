"""How fast the aggregator adds and takes in ciphertext, and how much memory that needs."""
