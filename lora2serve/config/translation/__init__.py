"""Configs of other trainers as recipes: what has a place in one is moved there, everything else is named."""
