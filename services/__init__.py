"""The three services, what they share, and the operators' tools."""
