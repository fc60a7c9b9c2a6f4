"""Schema of the aggregator's database, step by step."""
