"""One module per command. Each has ``register(subparsers)`` and a handler that returns an exit status."""
