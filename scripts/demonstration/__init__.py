"""The demonstration behind ``make demo``; the end-to-end tests install and break things with the same functions."""
