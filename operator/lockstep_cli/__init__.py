"""The user's tool."""
