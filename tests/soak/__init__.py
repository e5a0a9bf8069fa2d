"""Soak: one job on the local cluster goes through random faults for as long as you like, about one every 20 s, while
what operator and agents use of memory, descriptors and threads is read from this machine."""
