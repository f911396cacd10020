"""Rows in every form, tokenization and loss masks, the prompts of a comparison."""
