"""Seconds, bytes and memory of whole federations, and what the same work costs elsewhere."""
