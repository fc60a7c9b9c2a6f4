"""Measurements of the system. Nothing of the product imports this package."""
