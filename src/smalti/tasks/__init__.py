"""Whole tasks, as the command line and the page offer them."""
