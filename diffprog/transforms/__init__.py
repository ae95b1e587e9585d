"""JAX transformations as combinators: each wraps a layer and keeps its names."""
