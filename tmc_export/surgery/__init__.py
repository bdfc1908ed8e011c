"""Model and plan → torch modules of static shape, one per subgraph. Weights may be fake: nothing here reads them."""
