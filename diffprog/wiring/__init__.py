"""What composes layers: programs, combinators, merging."""
