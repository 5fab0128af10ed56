"""Measurements of this package against plain re-implementations of what it replaces; see README.md."""
