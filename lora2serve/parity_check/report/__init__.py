"""The report of a comparison: JSON, HTML, Markdown, JUnit."""
