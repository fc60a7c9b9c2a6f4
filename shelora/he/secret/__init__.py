"""The side that holds keys: OpenFHE contexts, keys, encryption and decryption. Never imported by the aggregator.

This is the only package that touches OpenFHE. Nothing a peer sent reaches the library's deserializer: ciphertexts and
keys travel as residues, are checked to be below the modulus, and are put into templates this process made itself.

Order-preserving scores are imported from their module: only agents need them and the library behind them.
"""

from shelora.he.secret.cipher import Decryptor, Encryptor, measure_encrypt_rate
from shelora.he.secret.context import CkksContext
from shelora.he.secret.keys import KeyPair, PublicKey, SecretKey
from shelora.he.secret.selftest import self_test

__all__ = [
    "CkksContext",
    "Decryptor",
    "Encryptor",
    "KeyPair",
    "PublicKey",
    "SecretKey",
    "measure_encrypt_rate",
    "self_test",
]
