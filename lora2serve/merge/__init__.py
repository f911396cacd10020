"""The fold: adapters onto a base, in float32, rounded once."""
