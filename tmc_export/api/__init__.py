"""What the command line and users call: `build` and `load`. Heavy rooms are imported inside the functions."""
