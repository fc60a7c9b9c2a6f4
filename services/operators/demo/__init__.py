"""The whole system on one machine: key manager, aggregator and unequal agents as processes, real training, real CKKS.

Run it with `python -m services.operators.demo`. Only here are agents told to reveal their clear factors, so that the
decrypted averages can be checked against float64 averages.
"""
