"""What the numbers mean: records, measures, tables and figures. Imports neither of the others."""
