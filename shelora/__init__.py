"""The SHE-LoRA method as a pure library: no I/O, no clock, no network."""

__version__ = "0.1.0"

__all__ = ["__version__"]
