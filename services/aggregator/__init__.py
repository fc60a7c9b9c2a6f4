"""The aggregator: federations, rounds, uploads, published averages. It holds no key."""
