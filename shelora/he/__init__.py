"""Homomorphic encryption: what both sides know (here, numpy only) and what needs a key (`shelora.he.secret`).

The aggregator uses this package alone: it checks residues and adds integers, without any HE library and without a key.
"""

from shelora.he.parameters import CkksParameters
from shelora.he.residues import ResidueSum, add_residues, as_blocks, check_residues, sum_residues

__all__ = ["CkksParameters", "ResidueSum", "add_residues", "as_blocks", "check_residues", "sum_residues"]
