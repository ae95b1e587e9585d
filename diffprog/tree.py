"""Trees of parameters and state: paths, patterns, and what is done to the leaves they find.

    paths, select, mask, count, nonfinite    of any tree
    verify, trainable, merge, unmerge        of the trees of a net
"""

# Written by tests/names.py --write.
from diffprog.core.nets import merge, trainable, unmerge, verify
from diffprog.core.paths import count, mask, nonfinite, paths, select
from diffprog.core.patterns import matches

__all__ = [
    "count", "mask", "matches", "merge", "nonfinite", "paths", "select", "trainable", "unmerge",
    "verify",
]
# To here.
