"""Why a template is not used."""

from __future__ import annotations


class TemplateNotProven(Exception):
    """Why no Go template stands for this Jinja template, in words."""
