"""What is said about a bundle after it was built: what it consists of, how fast it is."""
