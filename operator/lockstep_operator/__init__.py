"""Decides who is a member of a training job, and makes it so."""
