"""From text files to training samples: files, tokenizer, token files, and the check that all pods have the same."""
