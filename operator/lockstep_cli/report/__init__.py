"""A run's report: one HTML file, made from the run's journal."""
