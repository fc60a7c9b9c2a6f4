"""Accuracy parity: the protocol beside its peers, same data, same seeds, same steps."""
