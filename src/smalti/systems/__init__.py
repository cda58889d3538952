"""One page a paper: what a system is made of, and its claim. `catalogue.toml` lists all that smalti implements."""
