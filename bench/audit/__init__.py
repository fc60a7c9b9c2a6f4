"""The audit: what an attacker learns from what the aggregator sees, measured by attacking."""
