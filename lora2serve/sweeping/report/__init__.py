"""The page of a sweep, with the style of parity's."""
