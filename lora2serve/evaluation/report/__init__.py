"""The page of an evaluation or a comparison."""
