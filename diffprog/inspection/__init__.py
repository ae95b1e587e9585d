"""Looking at a net: tables, diagrams, costs."""
