"""The fault matrix: every fault of a table, at seeded instants of every phase, one after another in long jobs.

`faults` is the table, `strikes` how each is done, `moments` when, `deal` in which order; `grounds` finds the pods'
folders and processes on this machine; `judge` says what a recovery may look like; `campaign` plays it.
"""
