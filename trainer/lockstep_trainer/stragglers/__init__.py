"""Which rank is slow, since when, and why: from each rank's own work, step by step. Pure; the clock is the step."""
