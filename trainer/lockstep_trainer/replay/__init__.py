"""Ring replay: each data-parallel unit computes a micro-batch of its neighbour again, and the bits are compared."""
