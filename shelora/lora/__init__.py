"""LoRA algebra: canonical form, common basis, two-part average, reparameterization. numpy only.

Nothing here forms an m x n matrix except `plaintext_average`, the reference the tests compare with.
"""

from shelora.lora.aggregate import average, cipher_part, dense_average, plain_part, plaintext_average, project
from shelora.lora.basis import BasisSketch, basis, basis_rows
from shelora.lora.canonical import Factors, canonical
from shelora.lora.decomposition import decompose
from shelora.lora.reparameterize import Adapter, initial_adapter, pad_rank, reparameterize, truncate
from shelora.lora.residual import join, split
from shelora.lora.scaling import lora_scaling

__all__ = [
    "Adapter",
    "BasisSketch",
    "Factors",
    "average",
    "basis",
    "basis_rows",
    "canonical",
    "cipher_part",
    "decompose",
    "dense_average",
    "initial_adapter",
    "join",
    "lora_scaling",
    "pad_rank",
    "plain_part",
    "plaintext_average",
    "project",
    "reparameterize",
    "split",
    "truncate",
]
