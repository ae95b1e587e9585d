"""JAX transformations as combinators: each takes a layer and gives one with the same names."""
