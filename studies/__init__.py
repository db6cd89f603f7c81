"""Studies: one Python function per comparison, returning a `Study` (docs/studies.md)."""
