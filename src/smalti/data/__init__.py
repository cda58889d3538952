"""Data sets as typed samples."""
