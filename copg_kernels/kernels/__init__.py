"""One tile operation per file: a Triton kernel, its launcher, and a torch twin with the same signature."""
