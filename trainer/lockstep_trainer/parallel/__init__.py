"""How the model is spread over the GPUs. The model knows nothing of it; ``parallelize`` applies it from outside."""
