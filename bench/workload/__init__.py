"""The published workload, and variants of it, through real processes of all three services."""
