"""The layer and what every call of one needs: records, plans, paths, checks, errors."""
