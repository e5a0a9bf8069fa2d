"""Architectures. They know nothing of parallelism: ``lockstep_trainer.parallelize`` applies it from outside."""
