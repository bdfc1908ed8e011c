"""Finding the node at fault: which subgraph of a bundle fails, where in it, and the smallest model that still does."""
