"""The membership protocol, without I/O.

``member`` is an agent that holds a slot, ``leader`` conducts one epoch, ``node`` is what every pod runs: a member,
and the leader too where it holds slot 0. ``policy`` decides what a fault leads to, ``progress`` folds step summaries
and times recoveries, ``ledger`` classifies GPU-seconds. Each takes an event and the time and returns effects
(``events``, ``effects``); the agent's shell and the simulation carry them out.

Time is in Unix seconds and never runs backwards within a process.
"""
