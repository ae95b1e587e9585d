"""The layer and the parts that every call uses: records, plans, paths, checks, errors."""
