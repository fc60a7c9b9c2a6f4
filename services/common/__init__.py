"""What the services share: identities, clock, TLS, gRPC, storage, configuration, logs and metrics.

Nothing is re-exported here: each module is imported by its own name, so that a client agent never loads the database
code and an aggregator never loads what it does not use.
"""

__all__: list[str] = []
