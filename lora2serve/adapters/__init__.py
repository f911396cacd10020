"""A PEFT directory as deltas: every method by name, combination, rules of engines."""
