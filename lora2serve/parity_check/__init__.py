"""Proof that an export answers like the trained model."""
