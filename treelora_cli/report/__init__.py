"""Figures, tables and documents made from the files of a run directory."""
