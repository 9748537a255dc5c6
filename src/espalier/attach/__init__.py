"""Updates on live modules: which method makes them, where they sit, how a forward pass reaches them."""
