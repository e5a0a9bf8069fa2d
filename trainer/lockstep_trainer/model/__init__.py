"""Architectures. They know nothing of parallelism: ``lockstep_trainer.parallel`` applies it from outside."""
