"""Searches over recipes: which learning rate, which layers, which rank; what each costs, and which to take."""
