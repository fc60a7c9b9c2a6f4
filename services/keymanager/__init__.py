"""The key manager: certificate authority, key epochs, sealed secrets, audit log."""
