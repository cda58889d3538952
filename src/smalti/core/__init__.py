"""Protocols and shared types; imports nothing else of smalti."""
