"""Jobs in virtual time, with and without slow ranks, and what is to be said of them.

Written without sight of the detector, so that it can be scored on them. What counts as what:

- *Slow* is what makes the job's step longer by more than the scenario's threshold, and, where the slow part is a rank's
  own work (computing, host, batch), that work as well: both at least 1.2 times the threshold. For a link and for
  pauses, which aren't own work, the step alone counts. Both are measured without noise (`strength`).
- *Lasting* is a state of 40 steps or more, also one that comes and goes. Bursts of at most 12 steps are no findings:
  they are over before anything could be swapped. Nothing in between is generated.
- What is at most 0.8 times the threshold by either measure is to be kept silent about. In between either answer is
  right: the kind `near`, 0.8 to 1.2 times by the measure that sees less, is reported apart and not scored.
- The threshold is 0.1; slowness of 5 to 10 % runs with one of 0.05 (the kind `gentle`).
- A rank is to be named alone; a node, by all of its ranks, in one finding or several; a stage, by all of its ranks; the
  data rank with the longer documents, by any of its ranks; what all ranks share (store, pauses), by nobody or
  everybody.
- Not generated, since nothing in the job's own numbers tells: a link that is slow from the first step of a job of one
  group (the preflight's pair probes are for that); slow ranks that are half of their peers or more, except a single one
  of two that gets slow on the way.
"""
