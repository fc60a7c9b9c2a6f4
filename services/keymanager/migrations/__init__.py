"""Schema of the key manager's database, step by step."""
