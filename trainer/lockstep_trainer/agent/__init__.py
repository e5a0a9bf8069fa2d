"""The agent: asyncio around the protocol cores. It owns what must outlive a worker, and no training state.

``agent`` feeds events to the core and carries out its effects; ``server`` and ``streams`` speak with other agents and
the operator, ``workers`` and ``zygote`` with processes, ``durable`` with the object store.
"""
